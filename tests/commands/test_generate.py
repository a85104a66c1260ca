"""``cadapter generate`` as a user runs it: texts, seeds, prompts, and each wrong input."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from cadapter import terminal
from cadapter.adapters.directory import write_control_adapter
from cadapter.adapters.strengths import neumann_note
from cadapter.algebra import health
from cadapter.cli import app
from cadapter.errors import UsageError
from cadapter.models.generation import Sampling, continuation, encode_prompt
from tests.steered_models import make_adapter, make_model, rewrite_weights
from tests.tiny_models import HIDDEN
from tests.tiny_tokenizer import make_tokenizer

PROMPT = "The best of films"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("adapters") / "adapter").path


@pytest.fixture(autouse=True)
def _narrow_output(monkeypatch):
    """Typer folds its own error texts to the width of the terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    yield
    terminal.set_quiet(False)


def generate(*arguments, stdin: str | None = None):
    """Run ``cadapter generate`` on the CPU in this process; returns click's result."""
    return CliRunner().invoke(
        app, ["generate", "--device", "cpu", "--max-new-tokens", "12", *map(str, arguments)], input=stdin
    )


def texts(result) -> dict[str, str]:
    """What was printed under each heading, but for the next command to try."""
    assert result.exit_code == 0, result.stderr
    parts, heading = {}, ""
    for line in result.stdout.removesuffix("\n").split("\n"):
        if line.startswith("--- "):
            heading = line.strip("- ")
        else:
            parts[heading] = parts[heading] + "\n" + line if heading in parts else line
    if "--- next ---" in result.stdout:
        assert parts.pop("next").startswith(("cadapter ", "python convert_hf_to_gguf.py "))
    return parts


def greedy(base, prompt: str) -> str:
    """The most probable continuation as Hugging Face's pieces give it, BOS in front."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_base_continues_as_hugging_face_does(base):
    assert texts(generate(base, PROMPT, "--temperature", "0")) == {"prompt": PROMPT, "base": greedy(base, PROMPT)}


def test_strength_0_is_the_base_and_1_is_the_default(base, adapter):
    plain = texts(generate(base, PROMPT))["base"]
    assert texts(generate(base, PROMPT, "--adapter", adapter, "--strength", "0"))["strength 0 (base)"] == plain
    default = texts(generate(base, PROMPT, "--adapter", adapter))
    assert default == texts(generate(base, PROMPT, "--adapter", adapter, "--strength", "1"))
    assert default["strength +1"] != plain


def test_several_strengths_are_shown_in_their_order(base, adapter):
    several = texts(generate(base, PROMPT, "--adapter", adapter, "--strength", "2", "--strength", "-1"))
    assert list(several) == ["prompt", "strength +2", "strength -1"]
    for t in ("2", "-1"):
        alone = texts(generate(base, PROMPT, "--adapter", adapter, "--strength", t))
        assert alone[f"strength {float(t):+g}"] == several[f"strength {float(t):+g}"]


def test_compare_shows_what_each_strength_alone_shows(base, adapter):
    compared = texts(generate(base, PROMPT, "--adapter", adapter, "--compare"))
    assert list(compared) == ["prompt", "strength -1", "strength 0 (base)", "strength +1"]
    assert len(set(compared.values())) == 4
    for t in ("-1", "0", "1"):
        alone = texts(generate(base, PROMPT, "--adapter", adapter, "--strength", t))
        assert alone.items() <= compared.items()


def test_compare_without_sampling(base, adapter):
    compared = texts(generate(base, PROMPT, "--adapter", adapter, "--compare", "--temperature", "0"))
    assert len(set(compared.values())) == 4
    assert compared["strength 0 (base)"] == greedy(base, PROMPT)


def test_seeds_reproduce_and_differ(base):
    first, again, other = (texts(generate(base, PROMPT, "--seed", seed))["base"] for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_defaults_that_a_model_brings_along_do_not_sample(base, tmp_path):
    """A model whose own config says top-k 1 is sampled from as any other; the tokens that end a text still count."""
    copy = shutil.copytree(base, tmp_path / "copy")
    (copy / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 1, "eos_token_id": [2]}))
    sampled = texts(generate(copy, PROMPT))["base"]
    assert sampled == texts(generate(base, PROMPT))["base"]
    assert sampled != texts(generate(base, PROMPT, "--temperature", "0"))["base"]


def test_tokens_are_drawn_from_the_whole_distribution(base):
    """First tokens at a temperature that makes all of them likely, against one draw from the softmax."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    ids = encode_prompt(tokenizer, PROMPT)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, -1]
    for seed in range(8):
        torch.manual_seed(seed)
        drawn = torch.multinomial((logits / 5).softmax(-1), 1)
        sampling = Sampling(max_new_tokens=1, temperature=5.0, seed=seed)
        assert continuation(model, tokenizer, ids, sampling) == tokenizer.decode(drawn[0], skip_special_tokens=True)


def test_a_small_top_p_is_the_most_probable_token(base):
    narrow = texts(generate(base, PROMPT, "--top-p", "0.0001"))["base"]
    assert narrow == texts(generate(base, PROMPT, "--temperature", "0"))["base"]


def test_a_text_ends_where_the_model_ends_it(base, tmp_path):
    """The third greedy token, declared to end texts in the model's generation config, ends this one."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    ids = encode_prompt(tokenizer, PROMPT)
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)[
        0, ids.shape[1] :
    ]
    copy = shutil.copytree(base, tmp_path / "copy")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, tokens[2].item()]}))
    ended = texts(generate(copy, PROMPT, "--temperature", "0"))["base"]
    first = tokens.tolist().index(tokens[2].item())
    assert ended == tokenizer.decode(tokens[: first + 1])


def test_the_prompt_from_standard_input(base):
    given = texts(generate(base, PROMPT))
    assert texts(generate(base, stdin=PROMPT + "\n")) == given
    assert texts(generate(base, stdin=PROMPT)) == given


def test_quiet_prints_the_continuation_alone(base):
    loud = texts(generate(base, PROMPT))
    assert generate(base, PROMPT, "--quiet").stdout == loud["base"] + "\n"


def test_an_empty_prompt_begins_with_bos(base):
    assert texts(generate(base, "", "--temperature", "0"))["base"] == greedy(base, "")


def test_dtype_is_that_of_the_weights(base):
    def written(*dtype: str) -> list[str]:
        # A flat distribution and 200 tokens, so that bfloat16's rounding tips one of them.
        options = ("--temperature", "3", "--max-new-tokens", "50")
        return [texts(generate(base, PROMPT, *options, "--seed", seed, *dtype))["base"] for seed in range(4)]

    own = written()
    assert written("--dtype", "float32") == own
    assert written("--dtype", "bfloat16") != own


def test_a_text_beyond_the_models_positions_is_warned_of(base):
    result = generate(base, "word " * 60)
    assert result.exit_code == 0
    assert "the model was made for 64" in result.stderr


# ---- tokens of the prompt -----------------------------------------------------------------------------------------


def test_bos_is_put_in_front_once(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    plain = tokenizer(PROMPT)["input_ids"]
    assert encode_prompt(tokenizer, PROMPT).tolist() == [[1, *plain]]
    assert encode_prompt(tokenizer, "<|bos|>" + PROMPT).tolist() == [[1, *plain]]
    adds = make_tokenizer(tmp_path / "adds")
    adds.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    assert adds(PROMPT)["input_ids"] == [1, *plain]
    assert encode_prompt(adds, PROMPT).tolist() == [[1, *plain]]
    adds.chat_template = TEMPLATE
    chat = [1, 3, *plain, *tokenizer(">")["input_ids"]]
    assert encode_prompt(adds, PROMPT, chat=True).tolist() == [chat]
    adds.chat_template = TEMPLATE.removeprefix("{{ bos_token }}")
    assert encode_prompt(adds, PROMPT, chat=True).tolist() == [chat[1:]]


def test_a_tokenizer_without_bos(tmp_path):
    tokenizer = make_tokenizer(tmp_path, bos=None)
    assert encode_prompt(tokenizer, PROMPT).tolist() == [tokenizer(PROMPT)["input_ids"]]
    with pytest.raises(UsageError, match="The prompt is empty"):
        encode_prompt(tokenizer, "")


def test_chat_renders_the_prompt_as_a_turn(base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    chat = texts(generate(copy, PROMPT, "--chat", "--temperature", "0"))
    assert chat == {"prompt": PROMPT, "base": greedy(base, f"<|user|>{PROMPT}>")}
    (copy / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    result = generate(copy, PROMPT, "--chat")
    assert (result.exit_code, "its chat template fails: roles must alternate" in result.stderr) == (2, True)


# ---- the terminal -------------------------------------------------------------------------------------------------


def in_terminal(*arguments, columns: int) -> str:
    """What a user sees who runs ``cadapter`` in a terminal of so many columns, carriage returns left out."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [sys.executable, "-m", "cadapter", *map(str, arguments)],
        stdin=follower, stdout=follower, stderr=subprocess.DEVNULL, env=environment,
    ) as process:  # fmt: skip
        os.close(follower)
        seen = b""
        try:
            while data := os.read(leader, 65536):
                seen += data
        except OSError:  # how the end of a terminal shows on Linux
            pass
    os.close(leader)
    assert process.returncode == 0, seen.decode()
    return seen.decode().replace("\r", "")


@pytest.mark.processes
@pytest.mark.parametrize("columns", [120, 60])
def test_columns_where_there_is_room(base, adapter, columns):
    arguments = ("generate", base, PROMPT, "--adapter", adapter, "--compare", "--max-new-tokens", "3")
    lines = in_terminal(*arguments, columns=columns).splitlines()
    headings = [line for line in lines if "strength" in line]
    assert len(headings) == (1 if columns == 120 else 3)
    for label in ("strength -1", "strength 0 (base)", "strength +1"):
        assert label in " ".join(headings)


@pytest.mark.processes
def test_no_prompt_at_a_terminal():
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "cadapter", "generate", "anything"]
    done = subprocess.run(command, stdin=follower, capture_output=True, text=True, timeout=60)
    os.close(leader)
    os.close(follower)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: There is no prompt." in done.stderr


# ---- wrong input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strength", "0.5"], "--strength and --compare are for an adapter."),
        (["--compare"], "--strength and --compare are for an adapter."),
        (["--adapter", "ADAPTER", "--compare", "--strength", "2"], "give one of the two"),
        (["--adapter", "ADAPTER", "--strength", "nan"], "layer 0: the strength nan is not a finite number"),
        (["--adapter", "no/such/directory"], "no/such/directory is not a directory."),
        (["--adapter", "MODEL"], "is not an adapter directory: it has no adapter_config.json"),
        (["--temperature", "-1"], "give 0 (the most probable token) or above"),
        (["--temperature", "nan"], "give 0 (the most probable token) or above"),
        (["--top-p", "0"], "--top-p 0: give a number above 0 and at most 1."),
        (["--top-p", "1.5"], "--top-p 1.5: give a number above 0 and at most 1."),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: give at least 1."),
        (["--dtype", "int4"], "int4"),
        (["--device", "abacus"], "--device abacus cannot be used here"),
        (["--chat"], "the tokenizer has no chat template"),
    ],
)
def test_wrong_options(base, adapter, arguments, message):
    places = {"ADAPTER": str(adapter), "MODEL": str(base)}
    result = generate(base, PROMPT, *(places.get(argument, argument) for argument in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_no_prompt_in_standard_input(base):
    result = generate(base, stdin="\n")
    assert result.exit_code == 2
    assert "standard input is empty" in result.stderr


def test_no_model(tmp_path):
    result = generate(tmp_path, PROMPT)
    assert result.exit_code == 2
    assert "is not a model directory" in result.stderr


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"hidden": 16}, "another hidden size: 16, where the model has 32"), ({"layers": (2, 3)}, "factors for layer 3")],
)
def test_an_adapter_that_does_not_fit_is_refused_before_weights_are_read(base, tmp_path, fields, message):
    """A model that lacks a tensor loads no further than its headers; the adapter is refused before that is found."""
    copy = shutil.copytree(base, tmp_path / "copy")
    rewrite_weights(copy, lambda tensors: tensors.pop("model.norm.weight"))
    assert "lacks tensors of its llama model (1, such as model.norm.weight)" in generate(copy, PROMPT).stderr
    result = generate(copy, PROMPT, "--adapter", make_adapter(tmp_path / "adapter", **fields).path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_strength_that_does_not_exist_is_refused_with_its_layer(base, tmp_path):
    """I + W = I − u·uᵀ, a projection, in layer 1: it enhances, and has no inverse."""
    files = make_adapter(tmp_path / "random")
    u = torch.nn.functional.normalize(torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1)), dim=0)
    layer = files.layers[1]
    layer.A.zero_()[0], layer.B.zero_()[:, 0] = u, -u / files.scale
    directory = tmp_path / "projection"
    directory.mkdir()
    write_control_adapter(directory, files, "card\n")
    for options in (["--compare"], ["--strength", "-1"], ["--strength", "0.5"]):
        result = generate(base, PROMPT, "--adapter", directory, *options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "layer 1: I + W is singular" in result.stderr
    assert generate(base, PROMPT, "--adapter", directory).exit_code == 0


# ---- adapters trained with the Neumann series ---------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2])
def test_the_remainder_of_the_series_is_told_once(base, tmp_path, order):
    files = make_adapter(tmp_path / "adapter", spectral=0.3, inverse="neumann", neumann_order=order)
    measured = [health(f.A, f.B, files.scale) for f in files.layers.values()]
    expected = max(getattr(each, f"neumann_remainder_{order}") for each in measured)
    result = generate(base, PROMPT, "--adapter", files.path, "--compare")
    note = (
        f"Neumann series of order {order}; negative strengths use the exact inverse, from which the series differs by"
    )
    assert result.stderr.count("Neumann") == 1
    assert f"{note} at most {expected:.2g} (spectral norm)" in result.stderr
    assert "Neumann" not in generate(base, PROMPT, "--adapter", files.path).stderr


def test_there_is_nothing_to_tell_of_an_exact_inverse(tmp_path):
    assert neumann_note(make_adapter(tmp_path / "adapter"), (-1.0, 1.0)) is None
