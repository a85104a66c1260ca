"""From a file and overrides to a Config, or to one report of everything that is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cadapter.config import Config, config_warnings, idle_keys, load_config
from cadapter.config.schema import DatasetConfig
from cadapter.config.toml import toml_text
from cadapter.errors import UsageError

QUICK_START = """\
# As published with the method; only the directories are other ones.
model_dir = 'models/base'
output_dir = 'runs/first'

use_control_adapters = true
lora_rank = 16
layers_to_transform = '0:29'

lr = 2e-5
lora_weight_decay = 500.0

sequence_len = 4096
gradient_accumulation_steps = 64

[[datasets]]
dataset_path = 'texts/wanted/*.txt'
control_class = 1

[[datasets]]
dataset_path = 'texts/unwanted/*.txt'
control_class = -1
"""

REQUIRED = 'model_dir = "m"\noutput_dir = "o"\nuse_control_adapters = true\nlr = 1e-5\nsequence_len = 64\n'
DATASET = '[[datasets]]\ndataset_path = "d.txt"\n'
SYMMETRIC = "use_control_adapters = true\ncontrol_form = 'symmetric'\n"


@pytest.fixture
def load(tmp_path: Path):
    def load(source: str | bytes, *overrides: str) -> Config:
        path = tmp_path / "run.toml"
        path.write_bytes(source.encode() if isinstance(source, str) else source)
        return load_config(path, overrides)

    return load


@pytest.fixture
def report(load, tmp_path: Path):
    """The report on a wrong config, its lines without the directory of the file."""

    def report(source: str | bytes, *overrides: str) -> list[str]:
        with pytest.raises(UsageError) as caught:
            load(source, *overrides)
        assert caught.value.exit_code == 2
        return [line.removeprefix(f"{tmp_path}/") for line in str(caught.value).split("\n")]

    return report


def test_published_quick_start_loads_unchanged(load) -> None:
    config = load(QUICK_START)
    assert (config.model_dir, config.output_dir) == ("models/base", "runs/first")
    assert (config.use_control_adapters, config.lora_rank, config.layers_to_transform) == (True, 16, "0:29")
    assert (config.lr, config.lora_weight_decay) == (2e-5, 500.0)
    assert (config.sequence_len, config.gradient_accumulation_steps) == (4096, 64)
    assert [(d.dataset_path, d.control_class) for d in config.datasets] == [
        ("texts/wanted/*.txt", 1),
        ("texts/unwanted/*.txt", -1),
    ]
    assert config.alpha == 4.0
    assert config_warnings(config) == []


def test_everything_wrong_is_reported_at_once_in_the_order_of_the_file(report) -> None:
    source = """\
modell_dir = "m"
output_dir = 3
use_control_adapters = true
lora_rank = 0
lr = "fast"
sequence_len = 100
control_site = "blok"
class_weights = { positive = -1.0, negativ = 2 }
[[datasets]]
dataset_path = "a.txt"
control_class = 2
[[datasets]]
text_feild = "t"
overlength = "cut"
"""
    assert report(source, "epochs=0", "lora_rnk=3", "nonsense") == [
        'run.toml:1: modell_dir: unknown key; did you mean "model_dir"?',
        "run.toml:2: output_dir = 3: an integer is not accepted here; give a string that is not empty",
        "run.toml:4: lora_rank = 0: not allowed; give an integer of at least 1",
        'run.toml:5: lr = "fast": a string is not accepted here; give a number above 0',
        "run.toml:6: sequence_len = 100: not allowed; give a positive multiple of 64",
        'run.toml:7: control_site = "blok": no such choice; give "block", "mlp" or "writes"',
        'run.toml:8: class_weights.negativ: unknown key; did you mean "negative"?',
        "run.toml:8: class_weights.positive = -1.0: not allowed; give a number of at least 0",
        "run.toml:11: datasets.0.control_class = 2: no such class; give 1 (enhance), -1 (suppress) or 0 (neutral)",
        "run.toml:12: datasets.1.dataset_path: missing; give a string that is not empty",
        'run.toml:13: datasets.1.text_feild: unknown key; did you mean "text_field"?',
        'run.toml:14: datasets.1.overlength = "cut": no such choice; give "split", "truncate", "drop" or "error"',
        "run.toml: model_dir: missing; give a string that is not empty",
        "--set epochs=0: not allowed; give an integer of at least 1",
        '--set lora_rnk=3: unknown key; did you mean "lora_rank"?',
        "--set nonsense: not of the form KEY=VALUE; write for example lr=1e-5 or datasets.0.control_class=-1",
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("epochs = 1.0", "a number with a decimal point is not accepted here"),
        ('epochs = "1"', "a string is not accepted here"),
        ("epochs = true", "a truth value is not accepted here"),
        ("lora_dropout = 1.0", "from 0 to below 1"),
        ("lora_dropout = -0.1", "from 0 to below 1"),
        ("eval_fraction = 1", "from 0 to below 1"),
        ("beta2 = 1", "from 0 to below 1"),
        ("beta1 = nan", "from 0 to below 1"),
        ("lora_weight_decay = inf", "at least 0"),
        ("lora_weight_decay = true", "a truth value is not accepted here"),
        ("lora_weight_decay = 1" + "0" * 400, "at least 0"),
        ("eps = 0", "above 0"),
        ("seed = -1", "0 to 4294967295"),
        ("mix_datasets = 1", "give true or false"),
        ("control_class0_lambda = -1", "at least 0"),
        ("control_neumann_order = 0", "at least 1"),
        ("control_gamma = 0.6", "at most 0.5"),
        ("checkpoint_interval_hours = 0", "above 0"),
        ("max_sequences = 0", "at least 1"),
        ("micro_batch_size = 2024-01-01", "a date or time is not accepted here"),
        ('layers_to_transform = "5:2"', 'ends before it starts; write "2:5"'),
        ("layers_to_transform = 5", "an integer is not accepted here"),
        ('layers_to_transform = "five"', "is no range of layers"),
        ('partition_method = "type:("', "no regular expression"),
        ('partition_method = "best"', '"type:REGEX"'),
        ("activation_checkpointing = 0", "an integer of at least 1"),
        ("activation_checkpointing = true", "an integer of at least 1"),
        ('activation_checkpointing = "some"', '"auto", "none", "full"'),
        ("compile = 1", '"auto", true or false'),
        ("sequence_prefix = -1", "a token id or a list of token ids"),
        ("document_suffix = [1, true]", "a token id or a list of token ids"),
        ('mask_tokens = "all"', "true, false, a token id or a list of token ids"),
        ("class_weights = 1.0", "a table such as"),
        ("datasets = []", "at least one [[datasets]] table"),
        ('datasets = "a.txt"', "at least one [[datasets]] table"),
        ('datasets = ["a.txt"]', "a dataset is a table"),
        ('model_path = "x"', 'did you mean "model_dir"?'),
        ("zzz = 1", "unknown key; remove it"),
        ('"two\\nlines" = 1', 'run.toml:6: "two\\nlines": unknown key'),
        ("control_class = 1", "it stands under [[datasets]]"),
        ('cache_dir = "a\\u0000b"', "holds a NUL character"),
    ],
)
def test_wrong_values(report, line: str, says: str) -> None:
    source = REQUIRED + line + "\n" + ("" if line.startswith("datasets") else DATASET)
    lines = report(source)
    assert len(lines) == 1
    assert lines[0].startswith("run.toml:6: ")
    assert says in lines[0]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("control_class = true", "a truth value is not accepted here; give 1, -1 or 0"),
        ("control_class = 1.0", "give 1, -1 or 0"),
        ('control_class = "1"', "give 1, -1 or 0"),
        ("control_class = -2", "give 1 (enhance), -1 (suppress) or 0 (neutral)"),
        ('text_field = ""', "not empty"),
        ("max_tokens = 0", "at least 1"),
        ("lr = 3", "it stands above the first [table]"),
        ('messages_field = ""', "not empty"),
        ('rejected_field = "m"', "goes with chosen_field; give both"),
        ('overlength = "whole"', "no such choice"),
    ],
)
def test_wrong_values_in_a_dataset(report, line: str, says: str) -> None:
    lines = report(REQUIRED + DATASET + DATASET + line)
    assert len(lines) == 1
    assert lines[0].startswith(f"run.toml:10: datasets.1.{line.split(' ')[0]}")
    assert says in lines[0]


@pytest.mark.parametrize(
    ("keys", "key", "says"),
    [
        ({"messages_field": "m", "text_field": "t"}, "messages_field", "remove this key or text_field"),
        ({"chosen_field": "c"}, "chosen_field", "goes with rejected_field"),
        ({"chosen_field": "c", "rejected_field": "r", "messages_field": "m"}, "chosen_field", "remove text_field and"),
        ({"chosen_field": "c", "rejected_field": "r", "class_field": "k"}, "class_field", "what is chosen has class 1"),
        ({"class_field": "k", "control_class": -1}, "control_class", "say their class themselves"),
        ({"chosen_field": "c", "rejected_field": "r", "control_class": 0}, "control_class", "say their class"),
    ],
)
def test_what_a_dataset_cannot_hold_at_once(report, keys: dict, key: str, says: str) -> None:
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in keys.items())
    (entry,) = report(REQUIRED + DATASET + lines)
    assert f"datasets.0.{key} = " in entry
    assert says in entry


def test_pairs_and_classes_need_control_adapters(report) -> None:
    tables = DATASET + 'chosen_field = "c"\nrejected_field = "r"\n' + DATASET + 'class_field = "k"\n'
    lines = report(REQUIRED.replace("use_control_adapters = true", "use_control_adapters = false") + tables)
    assert [line.split(" = ")[0] for line in lines] == [
        "run.toml:8: datasets.0.chosen_field",
        "run.toml:12: datasets.1.class_field",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "lr_schedule = 'cosine'",
        "lora_alpha = 8",
        "eval_fraction = 0",
        "sequence_prefix = []",
        "document_suffix = 'x'",
        "document_prefix = 5",
        "mask_tokens = true",
        "mask_tokens = [1, 2]",
        "activation_checkpointing = 4",
        "activation_checkpointing = 'selective'",
        "activation_checkpointing = 'offload'",
        "compile = true",
        "compile = false",
        "attn_implementation = 'flash_attention_2'",
        "attn_implementation = 'flash_attention_3'",
        "partition_method = 'type:decoder.*'",
        "gradient_clipping = 0",
        "class_weights = { negative = 0.5 }",
        "drop_tails = true",
        "mix_datasets = true",
        "attn_implementation = 'eager'",
        "layers_to_transform = '0:10,30'",
        "control_gamma = 0.25",
        "control_form = 'symmetric'",
        "document_attention = 'packed'",
        "document_attention = 'isolated'",
        "overlength = 'truncate'",
        "full_fine_tune = false",
        "trust_remote_code = true",
    ],
)
def test_right_values(load, line: str) -> None:
    load(REQUIRED + line + "\n" + DATASET)


CONTROL, LORA, FULL = "use_control_adapters = true", "use_control_adapters = false", "full_fine_tune = true"


@pytest.mark.parametrize(
    ("mode", "key", "value"),
    [
        *((mode, "load_in_4bit", True) for mode in (CONTROL, LORA, "")),
        *((mode, "init_from", "a") for mode in (CONTROL, LORA)),
        *((mode, "lora_weight_dtype", "bfloat16") for mode in (CONTROL, LORA)),
        *((mode, "lora_dropout", 0.1) for mode in (CONTROL, LORA)),
        *((mode, "lora_weight_decay", 10.0) for mode in (CONTROL, LORA)),
        *((mode, "target_modules", ["q_proj", "mlp.down_proj"]) for mode in (LORA, FULL, "")),
        *((FULL, "gradient_dtype", value) for value in ("bfloat16", "float32")),
        *((mode, "layers_to_transform", "1:2") for mode in (CONTROL, LORA, FULL)),
        *((FULL, "dtype", value) for value in ("bfloat16", "float32")),
    ],
)
def test_every_way_to_train_has_its_keys(load, mode: str, key: str, value: object) -> None:
    config = load(REQUIRED.replace(CONTROL, mode) + f"{key} = {toml_text(value)}\n" + DATASET)
    assert getattr(config, key) == value
    assert (config.use_control_adapters, config.full_fine_tune) == (mode == CONTROL, mode == FULL)


@pytest.mark.parametrize(
    ("lines", "place", "says"),
    [
        (f"use_control_adapters = false\n{DATASET}control_class = -1", 8, "only Control Adapters know classes"),
        (f"use_control_adapters = false\n{DATASET}control_class = 0", 8, "only Control Adapters know classes"),
        (f"full_fine_tune = true\nlora_weight_decay = 1.0\n{DATASET}", 6, "full fine-tuning has no weight decay"),
        (f"full_fine_tune = true\nload_in_4bit = true\n{DATASET}", 6, "weights in 4 bits cannot be trained"),
        (f"full_fine_tune = true\nlora_dropout = 0.1\n{DATASET}", 6, "full fine-tuning has no adapters; remove"),
        (f"full_fine_tune = true\ninit_from = 'a'\n{DATASET}", 6, "the model to start from as model_dir"),
        (f"full_fine_tune = true\n{DATASET}control_class = -1", 8, "only Control Adapters know classes"),
        (f"full_fine_tune = true\n{DATASET}control_class = 0", 8, "only Control Adapters know classes"),
        (f"{DATASET}control_class = -1", 7, "only Control Adapters know classes"),
        (f"full_fine_tune = true\nuse_control_adapters = true\n{DATASET}", 5, "choose one of the two"),
        (f"{SYMMETRIC}lora_alpha = 4.0\n{DATASET}", 7, "the symmetric form has no scale"),
        (f"{SYMMETRIC}control_inverse = 'neumann'\n{DATASET}", 7, "needs no series"),
        (f"{SYMMETRIC}lora_weight_dtype = 'bfloat16'\n{DATASET}", 7, "cannot hold orthonormal"),
        (f"use_control_adapters = true\ntarget_modules = ['a']\n{DATASET}", 6, "Control Adapters act on whole layers"),
    ],
)
def test_impossible_combinations(report, lines: str, place: int, says: str) -> None:
    reports = report(REQUIRED.replace("use_control_adapters = true\n", "") + lines)
    assert [entry for entry in reports if entry.startswith(f"run.toml:{place}: ") and says in entry]


@pytest.mark.parametrize("key", ["lora_alpha = 4.0", "control_inverse = 'neumann'", "lora_weight_dtype = 'bfloat16'"])
def test_a_left_over_form_says_nothing_without_control_adapters(load, key: str) -> None:
    lines = f"control_form = 'symmetric'\n{key}\n{DATASET}"
    config = load(REQUIRED.replace("use_control_adapters = true\n", "") + lines)
    assert "control_form" in [problem.key for problem in idle_keys(config)]


def test_what_the_defaults_say_is_no_conflict(load) -> None:
    source = REQUIRED.replace("use_control_adapters = true", "full_fine_tune = true")
    zeros = "lora_weight_decay = 0\nlora_dropout = 0\nload_in_4bit = false\nuse_control_adapters = false\n"
    assert load(source + zeros + DATASET).full_fine_tune


def test_combinations_are_found_beside_wrong_keys_and_not_invented_from_them(report) -> None:
    source = REQUIRED.replace("use_control_adapters = true", "use_control_adapters = 'yes'")
    assert len(report(source + DATASET + "control_class = -1")) == 1
    both = report(REQUIRED + "epochs = 0\ntarget_modules = ['a']\n" + DATASET)
    assert [entry.split(":")[1] for entry in both] == ["6", "7"]


def test_a_config_made_in_python_is_checked_too() -> None:
    keys = {"model_dir": "m", "output_dir": "o", "lr": 1e-5, "sequence_len": 64}
    suppressed = (DatasetConfig(dataset_path="a", control_class=-1),)
    assert Config(**keys, use_control_adapters=True, datasets=suppressed).datasets[0].control_class == -1
    with pytest.raises(ValueError, match="only Control Adapters know classes"):
        Config(**keys, datasets=suppressed)


def test_messages_of_a_config_made_in_python_are_ours() -> None:
    keys = {"model_dir": "m", "output_dir": "o", "lr": 1e-5, "sequence_len": 64}
    suppressed = (DatasetConfig(dataset_path="a", control_class=-1),)
    for wrong, says in (
        ({"datasets": suppressed}, "only Control Adapters know classes"),
        ({"datasets": ()}, "no data to train on"),
        ({"datasets": suppressed, "use_control_adapters": True, "layers_to_transform": "x"}, "is no range of layers"),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            Config(**keys, **wrong)
        assert "Value error" not in str(caught.value)


def test_overrides_replace_what_the_file_says(load) -> None:
    config = load(
        QUICK_START,
        "lr=1e-4",
        "layers_to_transform=16:31",
        "datasets.1.control_class=0",
        "class_weights.negative=0.5",
        "output_dir=runs/a b",
        'model_dir="quoted"',
        "lr = 3e-4",
        "sequence_prefix=[1, 2]",
        "document_suffix=",
    )
    assert (config.lr, config.layers_to_transform) == (3e-4, "16:31")
    assert [dataset.control_class for dataset in config.datasets] == [1, 0]
    assert (config.class_weights.positive, config.class_weights.negative) == (1.0, 0.5)
    assert (config.output_dir, config.model_dir) == ("runs/a b", "quoted")
    assert (config.sequence_prefix, config.document_suffix) == ([1, 2], "")


def test_an_override_mends_a_wrong_value_and_adds_a_missing_one(load) -> None:
    source = REQUIRED.replace("lr = 1e-5", 'lr = "x"').replace("sequence_len = 64", "")
    config = load(source + DATASET, "lr=1e-5", "sequence_len=128")
    assert (config.lr, config.sequence_len) == (1e-5, 128)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr", "not of the form KEY=VALUE"),
        ("=1", "not of the form KEY=VALUE"),
        ("a..b=1", "not of the form KEY=VALUE"),
        ("lr=fast", "a string is not accepted here; give a number above 0"),
        ("lrr=1", 'unknown key; did you mean "lr"?'),
        ("optimiser.lr=1", "unknown key"),
        ("lr.x=1", "lr is no table; set lr itself"),
        ("datasets.2.control_class=1", '"2" is none of the 2 members of datasets'),
        ("datasets.first.control_class=1", '"first" is none of the 2 members of datasets'),
        ("datasets.1.control_class=5", "no such class"),
        ("datasets.1.lr=5", "it stands above the first [table]"),
        ("datasets.1=5", "a dataset is a table"),
        ("class_weights.5=1", "unknown key"),
        ("class_weights={ positive = -1 }", "give a number of at least 0"),
        ('target_modules=["q_proj"]', "Control Adapters act on whole layers"),
    ],
)
def test_problems_of_an_override_name_it(report, override: str, message: str) -> None:
    (line,) = report(QUICK_START, override)
    assert line.startswith(f"--set {override}: ")
    assert message in line


def test_an_override_that_makes_it_a_lora_meets_the_class_in_the_file(report, load) -> None:
    (line,) = report(QUICK_START, "use_control_adapters=false")
    number = QUICK_START.splitlines().index("control_class = -1") + 1
    assert line.startswith(f"run.toml:{number}: datasets.1.control_class = -1: only Control Adapters know classes")
    assert not load(QUICK_START, "use_control_adapters=false", "datasets.1.control_class=1").use_control_adapters


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no-such\.toml: there is no such file"):
        load_config(tmp_path / "no-such.toml")


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="this is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("source", "start"),
    [
        (b'lr = 1\nx = "\xff"\n', "run.toml:2: not UTF-8 (byte 0xff)"),
        ("lr = 1\nlr = 2\n", "run.toml:2:7: not valid TOML: Cannot overwrite a value"),
        ("lr = 1\r\nepochs = = 2\r\n", "run.toml:2:10: not valid TOML: "),
        ("lr = 1\nepochs = [1,\n", "run.toml:2: not valid TOML: "),
        ("lr = " + "[" * 100_000, "run.toml: not valid TOML: Values are nested too deeply"),
        ("lr = " + "9" * 5000, "run.toml: not valid TOML: Exceeds the limit"),
    ],
)
def test_what_is_no_toml(report, source: str | bytes, start: str) -> None:
    (line,) = report(source)
    assert line.startswith(start)


def test_byte_order_mark_and_windows_lines(load, report) -> None:
    source = b"\xef\xbb\xbf" + (REQUIRED + DATASET).replace("\n", "\r\n").encode()
    assert load(source).sequence_len == 64
    assert report(source.replace(b"sequence_len = 64", b"sequence_len = 65"))[0].startswith("run.toml:5: ")


def test_long_values_are_cut(report) -> None:
    (line,) = report(REQUIRED + f'control_site = "{"x" * 5000}"\n' + DATASET)
    assert len(line) < 200


def test_config_imports_neither_torch_nor_other_heavy_modules() -> None:
    heavy = ["torch", "transformers", "deepspeed", "numpy", "pyarrow", "peft", "safetensors"]
    program = f"import sys, cadapter.config; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
