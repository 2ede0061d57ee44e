"""ONNX files: the model's answers at every length, alone and in batches; int8; metadata; what is refused."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from asit.errors import CheckpointError, ConfigError
from asit.interop import exportable
from asit.interop.exportable import Extent, extent_of
from asit.interop.onnx import export, file, graph
from asit.model.audio_model import AudioModel

Run = Callable[[np.ndarray], np.ndarray]
NEED = 47 * 160 + 400  # samples of 48 frames
LENGTHS = (1, 399, 3001, NEED // 2, NEED)


def session(path: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    opened = onnxruntime.InferenceSession(str(path), options)
    return lambda waves: opened.run(None, {"waveform": waves})[0]


def exported(model: AudioModel, folder: Path, **options: Any) -> Run:
    export(model, folder / "m.onnx", overwrite=True, **options)
    return session(folder / "m.onnx")


@pytest.mark.parametrize("padding", ["silence", "zero", "repeat"])
def test_every_output_is_the_models_own(make_model: Any, make_waves: Any, tmp_path: Path, padding: str) -> None:
    m = make_model(multi=padding == "zero", front={"padding": padding})
    runs = {name: exported(m, tmp_path, output=name) for name in ("scores", "logits", "embedding", "frames")}
    for samples in (*LENGTHS, NEED + 3210):
        for rows in (1, 3):
            waves = make_waves(samples, rows)
            embedded = m.embed_batch(list(waves), precision="float32")
            np.testing.assert_allclose(
                runs["embedding"](waves), np.stack([one.clip.numpy() for one in embedded]), atol=1e-4, rtol=1e-4
            )
            np.testing.assert_allclose(
                runs["frames"](waves), np.stack([one.frames.numpy() for one in embedded]), atol=1e-4, rtol=1e-4
            )
            if samples <= NEED:
                want = m.scores(torch.from_numpy(waves), "float32").numpy()
                np.testing.assert_allclose(runs["scores"](waves), want, atol=1e-4)
            logits = torch.from_numpy(runs["logits"](waves))
            scores = logits.sigmoid() if m.multi else logits.softmax(1)
            np.testing.assert_allclose(runs["scores"](waves), scores, atol=1e-6)
    assert np.ptp(runs["scores"](make_waves(NEED, 3)), axis=0).max() > 0.05, "the weights are such that sounds differ"


def test_a_classifier_hears_longer_clips_with_stretched_positions(
    make_model: Any, make_waves: Any, tmp_path: Path
) -> None:
    m = make_model(pooling="class+mean")
    waves = make_waves(m.front_end.samples_for(64), 2)
    x = m.front_end(torch.from_numpy(waves))
    with torch.no_grad():
        want = m.head(m.encoder(x, stretch=True)).numpy()
        unlike = m.head(m.encoder(torch.cat([x[:, :, 32:], x[:, :, :32]], 2), stretch=True)).numpy()
    got = exported(m, tmp_path, output="logits")(waves)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(got - unlike).max() > 1e-2


VARIANTS: dict[str, dict[str, Any]] = {
    "two tokens, overlapping patches": {
        "distilled": True, "norm_eps": 1e-12, "patch_stride_frames": 5, "patch_stride_mels": 6, "pooling": "class",
    },
    "columns over all mel bins, no norm": {"patch_mels": 32, "patch_frames": 4, "norm": False, "pooling": "class+mean"},
    "another front end": {
        "front": {"window_ms": 20.0, "shift_ms": 10.0, "rate": 8000, "preemphasis": 0.0, "low_hz": 50.0}
    },
    "windows apart": {"front": {"window_ms": 8.0, "shift_ms": 10.0}},
    "hidden width": {"mlp_ratio": 1.5, "heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_other_encoders_and_front_ends(make_model: Any, make_waves: Any, tmp_path: Path, name: str) -> None:
    m = make_model(**VARIANTS[name])
    scores, frames = exported(m, tmp_path, output="scores"), exported(m, tmp_path, output="frames")
    need = m.front_end.samples_for(m.frames)
    for samples in (50, need // 3, need):
        waves = make_waves(samples, 2)
        want = m.scores(torch.from_numpy(waves), "float32").numpy()
        np.testing.assert_allclose(scores(waves), want, atol=1e-4)
        embedded = m.embed_batch(list(waves), precision="float32")
        np.testing.assert_allclose(frames(waves), np.stack([one.frames for one in embedded]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("int8", [False, True])
def test_no_clip_depends_on_the_others_of_its_batch(
    make_model: Any, make_waves: Any, tmp_path: Path, int8: bool
) -> None:
    run = exported(make_model(), tmp_path, output="logits", int8=int8)
    waves = make_waves(NEED, 4)
    waves[1] *= 50.0
    waves[2] = 0.0
    together = run(waves)
    assert np.isfinite(together).all()
    np.testing.assert_allclose(together, np.concatenate([run(row[None]) for row in waves]), atol=1e-5)
    np.testing.assert_allclose(together[0], run(np.stack([waves[0], waves[3]]))[0], atol=1e-5)


def test_what_is_too_long_is_refused_by_the_runtime_too(make_model: Any, make_waves: Any, tmp_path: Path) -> None:
    facts = export(make_model(), tmp_path / "m.onnx")
    run = session(tmp_path / "m.onnx")
    assert run(make_waves(facts["longest"])).shape == (1, 3)
    with pytest.raises(Exception, match=r"inputs_may_have_0\.7\d_seconds_at_most"):
        run(make_waves(facts["longest"] + 1))


@pytest.mark.parametrize(("patch", "step", "view"), [(16, 16, 63), (16, 10, 101), (8, 8, 6), (4, 3, 1)])
def test_lengths_in_samples_are_those_of_columns(patch: int, step: int, view: int) -> None:
    extent = Extent(400, 160, patch, step, view, 1, int(1.5 * view), 0)
    assert extent.columns(extent.longest) == extent.most
    assert extent.columns(extent.longest + 1) == extent.most + 1
    assert extent.training == 400 + 160 * ((view - 1) * step + patch - 1)
    assert extent.columns(extent.training) == view
    for samples in (0, 1, 399, 400, 5000, 12345, extent.training - 1):
        frames = 0 if samples < 400 else 1 + (samples - 400) // 160
        assert extent.columns(samples) == max(1, int((frames - patch) / step + 1.5))


def test_int8_is_near_and_as_near_as_onnxruntimes_own(make_model: Any, make_waves: Any, tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    m = make_model(width=64)
    waves = make_waves(NEED, 8)
    exact = exported(m, tmp_path, output="logits")(waves)
    plain = onnx.load(tmp_path / "m.onnx")
    coarse = exported(m, tmp_path, output="logits", int8=True)(waves)
    held = {one.name: numpy_helper.to_array(one) for one in onnx.load(tmp_path / "m.onnx").graph.initializer}
    whole = [name for name, value in held.items() if value.dtype == np.int8]
    assert len(whole) == 6 * m.encoder.depth
    assert all(name.startswith("block") for name in whole)
    assert {name for name, value in held.items() if value.dtype == np.float32} >= {
        "patches/weight", "head/weight", "fourier", "mel_bank"
    }  # fmt: skip
    assert abs(held[whole[0]]).max() == graph.LEVELS
    layers = [node.name for node in plain.graph.node if node.op_type == "Gemm" and "block" in node.name]
    assert len(layers) == len(whole)
    for node in plain.graph.node:  # the tool takes products of matrices, and leaves their sums alone
        if node.name in layers:
            shift, result = node.input[2], node.output[0]
            del node.input[2]
            node.op_type, node.output[0] = "MatMul", f"{result}:product"
            plain.graph.node.append(onnx.helper.make_node("Add", [f"{result}:product", shift], [result]))
    ordered = _sorted(plain)
    quantize_dynamic(
        ordered,
        tmp_path / "theirs.onnx",
        nodes_to_quantize=layers,
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
    )
    theirs = session(tmp_path / "theirs.onnx")(waves)
    ours_off, theirs_off = np.abs(coarse - exact).mean(), np.abs(theirs - exact).mean()
    assert 0 < ours_off < 1.5 * theirs_off
    assert ours_off < 0.1 * np.abs(exact).mean()


def _sorted(model: onnx.ModelProto) -> onnx.ModelProto:
    """Nodes in an order in which each comes after what it reads."""
    known = {"waveform", ""} | {one.name for one in model.graph.initializer}
    waiting, ordered = list(model.graph.node), []
    while waiting:
        ready = [node for node in waiting if known >= set(node.input)]
        waiting = [node for node in waiting if node not in ready]
        ordered += ready
        known |= {name for node in ready for name in node.output}
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    return model


def test_whole_numbers_of_a_weight_are_the_nearest() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1], [9], [0], [2]])
    whole, scale = graph.quantised(weight)
    assert (whole.shape, whole.dtype, scale.shape) == ((40, 5), np.int8, (5,))
    assert np.abs(whole).max(0).tolist() == [63, 63, 63, 0, 63]
    assert (np.abs(whole * scale - weight.numpy().T) <= scale / 2 + 1e-7).all()


def test_the_file_tells_what_a_client_has_to_know(make_model: Any, tmp_path: Path) -> None:
    m = make_model(multi=True)
    m.save(tmp_path / "model")
    facts = export(m, tmp_path / "m.onnx", int8=True)
    kept = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).get_modelmeta().custom_metadata_map
    assert json.loads(kept["classes"]) == ["dog", "مطر", "door"]
    assert (kept["rate"], kept["window"], kept["output"], kept["multi"]) == ("16000", str(NEED), "scores", "true")
    assert (kept["precision"], kept["license"], kept["opset"]) == ("int8", "cc0-1.0", "20")
    assert json.loads(kept["card"]) == m.card
    assert kept["sha256"] == json.loads((tmp_path / "model" / "card.json").read_text())["sha256"]
    loss, check = json.loads(kept["loss"]), json.loads(kept["check"])
    assert loss["of"] == "synthetic sounds"
    assert 0.9 < loss["smallest_cosine"] <= loss["cosine"] < 1.0
    assert check["largest_difference"] < 1e-4
    assert len(check["seconds"]) == 5
    assert facts["bytes"] == (tmp_path / "m.onnx").stat().st_size
    assert export(m, tmp_path / "m.onnx", overwrite=True, license="mit")["license"] == "mit"


def test_an_older_opset_gives_the_same(make_model: Any, make_waves: Any, tmp_path: Path) -> None:
    m, waves = make_model(), make_waves(NEED, 2)
    np.testing.assert_allclose(
        exported(m, tmp_path, opset=18)(waves), exported(m, tmp_path, opset=23)(waves), atol=1e-6
    )
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"), full_check=True)
    with pytest.raises(ConfigError, match=r"opset 17.*\n.*from 18 to 23"):
        export(m, tmp_path / "x.onnx", opset=17)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(make_model: Any, tmp_path: Path) -> None:
    m, encoder = make_model(), make_model(head=False)
    for wanted in ("scores", "logits"):
        with pytest.raises(ConfigError, match=f"{wanted} were asked for, and this model has no head and no labels"):
            export(encoder, tmp_path / "m.onnx", output=wanted)
    with pytest.raises(ConfigError, match=r"no output is named 'labels'.*\n.*scores, logits, embedding, frames"):
        export(m, tmp_path / "m.onnx", output="labels")
    with pytest.raises(ConfigError, match=r"ends in \.onnx"):
        export(m, tmp_path / "m.pb")
    (tmp_path / "d.onnx").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        export(m, tmp_path / "d.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["d.onnx"]
    assert export(encoder, tmp_path / "e.onnx")["output"] == "embedding"
    before = (tmp_path / "e.onnx").read_bytes()
    with pytest.raises(ConfigError, match="already exists"):
        export(m, tmp_path / "e.onnx")
    assert (tmp_path / "e.onnx").read_bytes() == before


def test_a_graph_that_disagrees_with_the_model_is_not_left(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "FLOOR", 1e-3)
    with pytest.raises(CheckpointError, match=r"the graph for m\.onnx differs from the model by .* for 1 waves"):
        export(make_model(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_gives_no_numbers_is_not_left(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "_session", lambda *_: lambda waves: np.full((len(waves), 3), np.nan, np.float32))
    with pytest.raises(CheckpointError, match="not all finite"):
        export(make_model(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_int8_that_does_not_suit_the_model_is_not_left(make_model: Any, tmp_path: Path) -> None:
    def measure(exact: Run, coarse: Run) -> dict[str, Any]:
        silence = np.zeros((1, NEED), np.float32)
        assert not np.array_equal(exact(silence), coarse(silence))
        return {"of": "clips of mine", "sounds": 3, "cosine": 0.5}

    with pytest.raises(CheckpointError, match=r"for 3 clips of mine have a mean cosine of 0\.500"):
        export(make_model(), tmp_path / "m.onnx", int8=True, measure=measure)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(to: Path, content: bytes) -> None:
        to.write_bytes(content[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "m.onnx").write_bytes(b"mine")
    monkeypatch.setattr(file, "_write", full)
    with pytest.raises(CheckpointError, match=r"the disk is full: .*m\.onnx was not written"):
        export(make_model(), tmp_path / "m.onnx", overwrite=True)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("m.onnx", b"mine")]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_extra_is_named(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"need {package}, which is not.*\n.*\n.*pip install 'asit-audio\[onnx\]'"):
        export(make_model(), tmp_path / "m.onnx")


def test_the_reference_is_what_the_model_says(make_model: Any, make_waves: Any) -> None:
    """What files are compared with, against the public doors, so that both cannot be wrong in the same way."""
    m = make_model(front={"padding": "zero"})
    for samples in LENGTHS:
        waves = torch.from_numpy(make_waves(samples, 2))
        torch.testing.assert_close(exportable.reference(m, "scores", waves), m.scores(waves, "float32"))
        clips = torch.stack([one.clip for one in m.embed_batch(list(waves), precision="float32")])
        torch.testing.assert_close(exportable.reference(m, "embedding", waves), clips, atol=1e-5, rtol=1e-5)
    assert extent_of(m, "scores").least == 6


def test_the_example_needs_neither_torch_nor_asit(
    make_model: Any, make_waves: Any, tmp_path: Path, repository: Path
) -> None:
    m = make_model()
    export(m, tmp_path / "m.onnx")
    example = repository / "examples" / "onnx_numpy.py"
    assert len(example.read_text().splitlines()) <= 20
    blocked = (
        "import runpy, sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] in ('torch', 'asit'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    for samples in (3000, NEED, 30000):
        clip = tmp_path / "clip.wav"
        with wave.open(str(clip), "wb") as written:
            written.setparams((1, 2, 16000, 0, "NONE", ""))
            written.writeframes((make_waves(samples)[0].clip(-1, 1) * 32767).astype("<i2").tobytes())
        done = subprocess.run(
            [sys.executable, "-c", blocked, str(example), str(tmp_path / "m.onnx"), str(clip)],
            capture_output=True, encoding="utf-8", timeout=60, env={"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = [line.split("  ") for line in done.stdout.splitlines()]
        want = m.tag(clip, precision="float32").top(3)
        assert [name for _, name in found] == [tag.label for tag in want]
        np.testing.assert_allclose([float(score) for score, _ in found], [tag.score for tag in want], atol=2e-4)
