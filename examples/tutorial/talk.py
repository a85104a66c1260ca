"""One prompt continued by llama.cpp, with no LoRA and with each of those that are named.

python talk.py BASE.gguf PROMPT [LORA.gguf …]    needs `pip install llama-cpp-python`
"""

from __future__ import annotations

import sys

from llama_cpp import Llama


def continued(base: str, lora: str | None, prompt: str, tokens: int = 80, seed: int = 3) -> str:
    """What llama.cpp writes after ``prompt``."""
    model = Llama(model_path=base, lora_path=lora, n_ctx=512, seed=seed, verbose=False)
    found = model.create_completion(prompt, max_tokens=tokens, temperature=0.7, top_p=0.9, seed=seed)
    return found["choices"][0]["text"]


if __name__ == "__main__":
    base, prompt, *loras = sys.argv[1:]
    for lora in (None, *loras):
        print(f"--- {lora or 'the base'} ---\n{prompt}{continued(base, lora, prompt)}\n")
