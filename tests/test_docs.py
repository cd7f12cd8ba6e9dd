"""The pages for users say what is so: their commands run, on small models; their options and their links exist."""

import importlib.util
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
import words
import zoo
import zoo_decoders
import zoo_fx
import zoo_genai
import zoo_merged

from liar_opt.tools import cli
from liar_opt.tools.cli_options import COMMANDS, parse, parser_of

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
OPTION = re.compile(r"`(--[a-z][a-z-]*)[^`]*`")
ROWS, LAYERS = 32, {"num_hidden_layers": 2}
NBITS = "onnxruntime.quantization.matmul_nbits_quantizer"
"""Which the oldest ONNX Runtime has under another name."""

NOT_RUN = {
    "demo": "its model comes from a registry",
    "glue:sst2": "a dataset of the hub",
    "latency=": "what a clock says of a model this small is chance",
    "voice.onnx": "no voice is made here",
}
"""Commands that are only parsed, by a part of each, and why."""


# What the pages speak of, made small -------------------------------------------------------------------------------------


def sentences(count: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    return "\n".join(" ".join(rng.choice(words.WORDS, rng.integers(4, 12))) for _ in range(count)) + "\n"


def texts(folder: Path) -> None:
    for seed, name in enumerate(("texts", "held-out", "reviews")):
        (folder / f"{name}.txt").write_text(sentences(48 if name != "reviews" else 4, seed), encoding="utf-8")
    words.save_tokenizer(folder / "tokenizer")


def arrays(path: Path, **drawn: Any) -> None:
    np.savez(path, **drawn)


def normal(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def export(module: Any, feeds: dict[str, np.ndarray[Any, Any]], output: str, path: Path) -> None:
    """Writes the first output of a module of one input or more, with an open batch."""

    class First(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: torch.Tensor) -> Any:
            return self.module(**dict(zip(feeds, inputs, strict=True)), return_dict=False)[0]

    axes = {name: {0: "batch"} for name in (*feeds, output)}
    given = tuple(torch.from_numpy(v) for v in feeds.values())
    names: dict[str, Any] = {"input_names": list(feeds), "output_names": [output], "dynamic_axes": axes}
    torch.onnx.export(First().eval(), given, str(path), opset_version=17, dynamo=False, **names)


def deep_bert() -> Path:
    """Four layers, every second one of other widths."""
    return zoo.ready(next(c for c in zoo.deep_cases() if (c.architecture, c.exporter) == ("bert", "torchscript"))).path


def encoder(folder: Path) -> None:
    texts(folder)
    (folder / "model.onnx").write_bytes(deep_bert().read_bytes())
    checkpoint("BertModel", folder / "path/to/hf-model", **zoo_fx.TEXT | LAYERS)
    words.save_tokenizer(folder / "path/to/hf-model")


def checkpoint(model: str, folder: Path, **config: Any) -> Any:
    """Writes a model with seeded weights."""
    model_class = getattr(transformers, model)
    torch.manual_seed(0)
    module = model_class(model_class.config_class(**config)).eval()
    module.save_pretrained(folder)
    return module


def language_model(folder: Path) -> None:
    texts(folder)
    for seed, name in enumerate(("texts", "held-out")):
        (folder / f"{name}.txt").write_text(sentences(160, seed), encoding="utf-8")
    words.plain_tokenizer(folder / "tokenizer")
    ends = {"bos_token_id": words.CLS, "eos_token_id": words.SEP, "pad_token_id": words.PAD}
    checkpoint(
        "LlamaForCausalLM", folder / "path/to/hf-model", **zoo_fx.GROUPED | ends | LAYERS | {"max_position_embeddings": 256}
    )
    words.plain_tokenizer(folder / "path/to/hf-model")
    decoder(folder / "decoder")


def decoder(folder: Path) -> None:
    """As the model builder of GenAI writes one, with its configuration."""
    folder.mkdir()
    shape = zoo_genai.Shape(layers=2)
    onnx.save(zoo_genai.decoder(shape), folder / "model.onnx")
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.groups, "num_hidden_layers": 2}
    said = {"model": {"decoder": {"filename": "model.onnx", **heads}, "vocab_size": zoo_genai.VOCABULARY}}
    (folder / "genai_config.json").write_text(json.dumps(said))


def merged_decoder() -> onnx.ModelProto:
    """As Whisper's: its branches read what the encoder makes, and no mask of it."""
    proto = onnx.load(zoo_merged.ready("bart"))
    mask = next(v for v in proto.graph.input if v.name == "encoder_attention_mask")
    proto.graph.input.remove(mask)
    ones = onnx.helper.make_tensor("ones", onnx.TensorProto.INT64, [1], [1])
    for attribute in proto.graph.node[0].attribute:
        sizes = onnx.helper.make_node("Shape", ["encoder_hidden_states"], ["sizes"], end=2)
        filled = onnx.helper.make_node("ConstantOfShape", ["sizes"], [mask.name], value=ones)
        nodes = [sizes, filled, *attribute.g.node]
        del attribute.g.node[:]
        attribute.g.node.extend(nodes)
    return proto


def speech(folder: Path) -> None:
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 2}
    config = zoo_fx.MODELS["whisper"].config | heads | {"d_model": zoo_decoders.HIDDEN}
    whisper = checkpoint("WhisperModel", folder / "path/to/whisper", **config)
    features = normal(ROWS, 16, 48)
    ids = np.random.default_rng(1).integers(3, zoo_fx.VOCABULARY, (ROWS, zoo_fx.TARGET))
    arrays(folder / "sounds.npz", input_features=features, decoder_input_ids=ids)
    arrays(folder / "features.npz", input_features=features)
    export(whisper.encoder, {"input_features": features[:2]}, "hidden", folder / "encoder_model.onnx")
    onnx.save(merged_decoder(), folder / "decoder_model_merged.onnx")
    zoo_fx.build("wav2vec2").save_pretrained(folder / "path/to/wav2vec2")
    arrays(folder / "waves.npz", input_values=normal(ROWS, 411))


def vision(folder: Path) -> None:
    config = zoo_fx.IMAGE | LAYERS | {"num_labels": 3}
    module = checkpoint("ViTForImageClassification", folder / "path/to/vit", **config)
    images = normal(ROWS, 3, 24, 24)
    export(module, {"pixel_values": images[:2]}, "logits", folder / "model.onnx")
    arrays(folder / "images.npz", pixel_values=images)
    labels = np.random.default_rng(1).integers(0, 3, ROWS)
    arrays(folder / "labelled.npz", pixel_values=images[::-1].copy(), label=labels)


def quantised(folder: Path) -> None:
    encoder(folder)
    ids = np.random.default_rng(0).integers(4, 24, (ROWS, 12))
    arrays(folder / "batches.npz", input_ids=ids, attention_mask=np.ones_like(ids), token_type_ids=np.zeros_like(ids))


def served(folder: Path) -> None:
    encoder(folder)
    words.plain_tokenizer(folder / "tokenizer")
    decoder(folder / "genai")
    words.plain_tokenizer(folder / "genai")
    (folder / "decoder_model_merged.onnx").write_bytes(zoo_merged.ready("gpt2").read_bytes())
    wide = {**zoo_fx.GROUPED, **LAYERS, "intermediate_size": 512, "max_position_embeddings": 256}
    checkpoint("LlamaForCausalLM", folder / "path/to/llama", **wide)
    words.plain_tokenizer(folder / "path/to/llama")


def compared(folder: Path) -> None:
    texts(folder)
    case = next(c for c in zoo.every_case() if c.name == "bert-classifier-torchscript-sdpa-dynamic")
    for name in ("dense", "pruned"):
        (folder / f"{name}.onnx").write_bytes(zoo.ready(case).path.read_bytes())
    rows = [{"sentence": text, "label": i % 3} for i, text in enumerate(sentences(24, 3).splitlines())]
    (folder / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


PAGES: dict[str, Callable[[Path], None]] = {
    "docs/an-encoder.md": encoder,
    "docs/a-language-model.md": language_model,
    "docs/speech.md": speech,
    "docs/vision.md": vision,
    "docs/goals.md": encoder,
    "docs/quantise.md": quantised,
    "docs/serve.md": served,
    "docs/compare-models.md": compared,
    "docs/from-python.md": encoder,
    "docs/options.md": encoder,
    "docs/patterns.md": encoder,
}
"""The pages whose code is run, and what makes the files that it names."""


# What stands on a page ---------------------------------------------------------------------------------------------------


def blocks(page: str) -> list[tuple[str, str]]:
    """Returns (language, code) of the fenced blocks of a page."""
    found = FENCE.findall((ROOT / page).read_text(encoding="utf-8"))
    return [(kind, re.sub(f"^{indent}", "", code, flags=re.MULTILINE)) for indent, kind, code in found]


def commands(code: str) -> list[list[str]]:
    """Returns the arguments of each ``liar-opt`` of a block for a shell."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            name, *arguments = shlex.split(part, comments=True) or [""]
            if Path(name).name == "liar-opt":
                found.append(arguments)
    return found


def command_of(arguments: list[str]) -> tuple[str, list[str]]:
    """Returns the command and what is behind it."""
    return (arguments[0], arguments[1:]) if arguments[0] in COMMANDS else ("prune", arguments)


def said(arguments: list[str]) -> str:
    return " ".join(arguments)


ALL = [
    (page, arguments)
    for page in ("README.md", *PAGES)
    for kind, code in blocks(page)
    if kind == "sh"
    for arguments in commands(code)
]


@pytest.mark.parametrize(("page", "arguments"), ALL, ids=[f"{page}: {said(a)}" for page, a in ALL])
def test_a_command_is_understood(page: str, arguments: list[str]) -> None:
    parse(*command_of(arguments))


def test_what_is_not_run_is_little() -> None:
    idle = [said(a) for _, a in ALL if any(part in said(a) for part in NOT_RUN)]
    assert all(any(part in command for command in idle) for part in NOT_RUN)
    assert len(idle) == len(NOT_RUN)


def test_what_the_readme_says_is_run_on_a_page() -> None:
    own = [arguments for page, arguments in ALL if page == "README.md" and arguments != ["demo"]]
    elsewhere = [arguments for page, arguments in ALL if page in PAGES]
    assert len(own) == 5
    assert [said(arguments) for arguments in own if arguments not in elsewhere] == []


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures latency for no longer than it takes."""
    from liar_opt.passes import module_backend, onnx_backend
    from liar_opt.runtime.latency import measure_latency
    from liar_opt.tools import eval_command

    for module in (onnx_backend, module_backend, eval_command):
        if hasattr(module, "measure_latency"):
            monkeypatch.setattr(module, "measure_latency", lambda s, f, **_: measure_latency(s, f, budget=0.0, least=1))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "short")
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the page, in one folder; each result is where the page says."""
    with zoo._quiet():
        PAGES[page](tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    ran = 0
    for kind, code in blocks(page):
        if kind == "python" and not (NBITS in code and importlib.util.find_spec(NBITS) is None):
            exec(compile(code, page, "exec"), names)
            ran += 1
        for folder in re.findall(r"^mkdir (.+)$", code, re.MULTILINE) if kind == "sh" else ():
            Path(folder).mkdir()
        for arguments in commands(code) if kind == "sh" else ():
            if any(part in said(arguments) for part in NOT_RUN):
                continue
            capsys.readouterr()
            assert cli.main(arguments) == 0, (said(arguments), capsys.readouterr().err)
            ran += 1
            options = parse(*command_of(arguments))
            if getattr(options, "output", None):
                assert Path(options.output).exists(), said(arguments)
    assert ran


# Options and links -------------------------------------------------------------------------------------------------------


def flags(command: str) -> set[str]:
    return {flag for action in parser_of(command)._actions for flag in action.option_strings if flag.startswith("--")}


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_the_options_of_a_page_exist(page: str) -> None:
    known = set().union(*(flags(command) for command in COMMANDS))
    text = re.sub(r"<!--.*?-->", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert sorted(set(OPTION.findall(text)) - known) == []


def test_the_page_of_options_has_all() -> None:
    text = (DOCS / "options.md").read_text(encoding="utf-8")
    named = set(re.findall(r"--[a-z][a-z-]*", text))
    assert sorted(flags("prune") - named - {"--help", "--version", "--output"}) == []


def anchors(path: Path) -> set[str]:
    """Returns what GitHub calls the headings of a page."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for link in LINK.findall(FENCE.sub("", document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (document.parent / place).resolve() if place else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_each_page_is_linked_from_the_readme_or_the_house() -> None:
    linked = {link for name in ("README.md", "docs/house.md") for link in LINK.findall((ROOT / name).read_text("utf-8"))}
    names = {Path(link.partition("#")[0]).name for link in linked}
    assert [path.name for path in DOCUMENTS[1:] if path.name not in names] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
