"""A tokenizer whose tokens can be counted by hand, and chat templates of the kinds that there are."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<pad>", "<bos>", "<eos>", "<start>", "<end>", "<header>", "</header>", "<user>", "<assistant>", "<tool_call>",
]  # fmt: skip
WORDS = (
    "system user assistant tool You are terse Hi Hello How much is 6 * 7 42 It Thanks Bye hm so <think> </think> add "
    "a b result calls with \n ."
)

CHATML = """\
{%- for message in messages %}
{{- '<start>' + message['role'] + '\\n' + message['content'] + '<end>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start>assistant\\n' }}{% endif %}"""

HEADERS = """\
{{- '<bos>' }}
{%- for message in messages %}
{{- '<header>' + message['role'] + '</header>\\n\\n' + message['content'] | trim + '<eos>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<header>assistant</header>\\n\\n' }}{% endif %}"""

CLOSED_BY_EOS = """\
{%- for message in messages %}
{{- '<' + message['role'] + '>\\n' + message['content'] + '<end>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>\\n' }}{% else %}{{- eos_token }}{% endif %}"""

TOOLS = """\
{%- if tools %}
{{- '<start>system\\n' }}
{%- for tool in tools %}{{- tool.name + ' ' }}{% endfor %}
{{- '<end>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<start>' + message['role'] + '\\n' }}
{%- if message.content %}{{- message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + call.function.name }}
{%- for name, value in call.function.arguments.items() %}{{- ' ' + name + ' ' + value | string }}{% endfor %}
{%- endfor %}
{{- '<end>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start>assistant\\n' }}{% endif %}"""

FORGETS_THOUGHTS = """\
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and not loop.last and '</think>' in content %}
{%- set content = content.split('</think>')[-1] | trim %}
{%- endif %}
{{- '<start>' + message.role + '\\n' + content + '<end>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start>assistant\\n' }}{% endif %}"""

NO_SYSTEM = """\
{%- for message in messages %}
{%- if message.role == 'system' %}{{ raise_exception('there is no system role here') }}{% endif %}
{{- '<' + message['role'] + '>' + message['content'] }}
{%- endfor %}"""


def make_chat_tokenizer(directory: Path, template: str | None) -> PreTrainedTokenizerFast:
    """Save a tokenizer of words, single spaces, line breaks and :data:`SPECIAL` tokens in ``directory``."""
    words = dict.fromkeys([*SPECIAL, "<unk>", " ", "\n", *WORDS.split(" ")])
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| |\.|[^\n .]+"), "isolated")
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = template
    fast.save_pretrained(directory)
    return fast
