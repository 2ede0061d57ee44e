"""ONNX files: the model's outputs at every length, alone and in batches; int8; metadata; what is refused."""

from __future__ import annotations

import errno
import json
import re
import runpy
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
import soundfile
import soxr
import torch
from onnx import numpy_helper
from packaging.version import Version

from asit.errors import CheckpointError, ConfigError
from asit.interop import exportable
from asit.interop import onnx as file
from asit.interop.exportable import Extent, extent_of
from asit.interop.onnx import export
from asit.model.audio_model import AudioModel

pytestmark = pytest.mark.usefixtures("one_trace_a_model")

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


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["silence", "zero", "repeat"])
def test_every_output_is_the_models_own(make_model: Any, make_waves: Any, tmp_path: Path, padding: str) -> None:
    m = make_model(multi=padding == "zero", front={"padding": padding})
    runs = {name: exported(m, tmp_path, output=name) for name in ("scores", "logits", "embedding", "frames")}
    for samples in (*LENGTHS, NEED + 3210):
        for rows in (1, 3):
            waves = make_waves(samples, rows)
            embedded = m.embed_batch(list(waves), precision="float32")
            for name, kind in (("embedding", "clip"), ("frames", "frames")):
                want = np.stack([getattr(one, kind).numpy() for one in embedded])
                np.testing.assert_allclose(runs[name](waves), want, atol=1e-4, rtol=1e-4)
            if samples <= NEED:
                want = m.scores(torch.from_numpy(waves), "float32").numpy()
                np.testing.assert_allclose(runs["scores"](waves), want, atol=1e-4)
            logits = torch.from_numpy(runs["logits"](waves))
            scores = logits.sigmoid() if m.multi else logits.softmax(1)
            np.testing.assert_allclose(runs["scores"](waves), scores, atol=1e-6)
    assert np.ptp(runs["scores"](make_waves(NEED, 3)), axis=0).max() > 0.05, "the weights are such that sounds differ"


def test_scores_are_the_models_own(
    make_model: Any, make_waves: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    m = make_model()
    run = exported(m, tmp_path)
    assert capfd.readouterr() == ("", ""), "the exporter's remarks"
    for samples in LENGTHS:
        for rows in (1, 3):
            waves = make_waves(samples, rows)
            np.testing.assert_allclose(run(waves), m.scores(torch.from_numpy(waves), "float32").numpy(), atol=1e-4)
    assert np.ptp(run(make_waves(NEED, 3)), axis=0).max() > 0.05, "the weights are such that sounds differ"


@pytest.mark.parametrize(
    ("output", "axes"),
    [("scores", ["batch", 3]), pytest.param("frames", ["batch", "columns", 32], marks=pytest.mark.slow)],
)
def test_axes_have_their_documented_names(make_model: Any, tmp_path: Path, output: Any, axes: list[Any]) -> None:
    for int8_too in (False, True):
        export(make_model(), tmp_path / "m.onnx", output=output, int8=int8_too, overwrite=True)
        graph = onnx.load(tmp_path / "m.onnx").graph
        found = [[size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
                 for value in (*graph.input, *graph.output)]  # fmt: skip
        assert found == [["batch", "samples"], axes]
        if Version(torch.__version__) < Version("2.13"):
            continue  # older exporters leave names of their own inside the graph
        named = {size.dim_param for value in graph.value_info for size in value.type.tensor_type.shape.dim}
        assert not any(re.search(r"\bu\d", name) for name in named)


def test_a_classifier_hears_longer_clips_with_stretched_positions(
    make_model: Any, make_waves: Any, tmp_path: Path
) -> None:
    m = make_model()
    waves = make_waves(m.front_end.samples_for(64), 2)
    x = m.front_end(torch.from_numpy(waves))
    with torch.no_grad():
        want = m.head(m.encoder(x, stretch=True)).softmax(1).numpy()
        unlike = m.head(m.encoder(torch.cat([x[:, :, 32:], x[:, :, :32]], 2), stretch=True)).softmax(1).numpy()
    got = exported(m, tmp_path)(waves)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(got - unlike).max() > 1e-3


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


@pytest.mark.slow
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


@pytest.mark.parametrize("coarse", [False, True])
def test_no_clip_depends_on_the_others_of_its_batch(
    make_model: Any, make_waves: Any, tmp_path: Path, coarse: bool
) -> None:
    run = exported(make_model(), tmp_path, int8=coarse)
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
        assert extent.frames(samples) == frames
        assert extent.columns(samples) == max(1, int((frames - patch) / step + 1.5))


def test_int8_is_near(make_model: Any, make_waves: Any, tmp_path: Path) -> None:
    m = make_model()
    waves = make_waves(NEED, 8)
    exact = exported(m, tmp_path)(waves)
    coarse = exported(m, tmp_path, int8=True)(waves)
    held = {one.name: numpy_helper.to_array(one) for one in onnx.load(tmp_path / "m.onnx").graph.initializer}
    whole = [name for name, value in held.items() if value.dtype == np.int8]
    assert len(whole) == 6 * m.encoder.depth
    assert all(abs(held[name]).max() == file.LEVELS for name in whole)
    assert not any(name.startswith("blocks.") and value.ndim == 2 for name, value in held.items())
    assert held.keys() >= {"head.linear.weight", "fourier", "bank"}
    off = np.abs(coarse - exact).mean()
    assert 0 < off < 0.05 * exact.mean()


@pytest.mark.slow
def test_int8_is_as_near_as_onnxruntimes_own(make_model: Any, make_waves: Any, tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    m = make_model(width=64)
    waves = make_waves(NEED, 8)
    exact = exported(m, tmp_path, output="logits")(waves)
    plain = onnx.load(tmp_path / "m.onnx")
    coarse = exported(m, tmp_path, output="logits", int8=True)(waves)
    layers = [node.name for node in plain.graph.node if node.op_type == "Gemm" and "blocks." in node.input[1]]
    assert len(layers) == 6 * m.encoder.depth
    quantize_dynamic(
        plain,
        tmp_path / "theirs.onnx",
        nodes_to_quantize=[f"{name}_MatMul" for name in layers],
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
    )
    kinds = [node.op_type for node in onnx.load(tmp_path / "theirs.onnx").graph.node]
    assert kinds.count("MatMulInteger") == len(layers)
    theirs = session(tmp_path / "theirs.onnx")(waves)
    ours_off, theirs_off = np.abs(coarse - exact).mean(), np.abs(theirs - exact).mean()
    assert 0 < ours_off < 1.5 * theirs_off
    assert ours_off < 0.1 * np.abs(exact).mean()


def test_whole_numbers_of_a_weight_are_the_nearest() -> None:
    scales = np.array([[1e-3], [1], [9], [0], [2]], np.float32)
    weight = np.random.default_rng(0).standard_normal((5, 40), np.float32) * scales
    whole, scale = file.quantised(weight)
    assert (whole.shape, whole.dtype, scale.shape) == ((40, 5), np.int8, (5,))
    assert np.abs(whole).max(0).tolist() == [63, 63, 63, 0, 63]
    assert (np.abs(whole * scale - weight.T) <= scale / 2 + 1e-7).all()


def test_nothing_of_the_machine_that_wrote_it_is_in_a_file(make_model: Any, tmp_path: Path, repository: Path) -> None:
    export(make_model(), tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    assert str(repository).encode() not in content
    assert b".py" not in content


def test_the_file_tells_what_a_client_has_to_know(make_model: Any, tmp_path: Path) -> None:
    m = make_model()
    m.save(tmp_path / "model")
    facts = export(m, tmp_path / "m.onnx", int8=True)
    kept = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).get_modelmeta().custom_metadata_map
    assert json.loads(kept["classes"]) == ["dog", "مطر", "door"]
    assert (kept["rate"], kept["window"], kept["output"], kept["multi"]) == ("16000", str(NEED), "scores", "false")
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


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 19, 21, 23])
def test_other_opsets_give_the_same(make_model: Any, make_waves: Any, tmp_path: Path, opset: int) -> None:
    m, waves = make_model(), make_waves(NEED, 2)
    for coarse, tolerance in ((False, 1e-6), (True, 1e-3)):
        run = exported(m, tmp_path, opset=opset, int8=coarse)
        model = onnx.load(tmp_path / "m.onnx")
        onnx.checker.check_model(model, full_check=True)
        assert [(one.domain, one.version) for one in model.opset_import] == [("", opset)]
        np.testing.assert_allclose(run(waves), exported(m, tmp_path, int8=coarse)(waves), atol=tolerance)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(make_model: Any, tmp_path: Path) -> None:
    m, encoder = make_model(), make_model(head=False)
    for wanted in ("scores", "logits"):
        with pytest.raises(ConfigError, match=f"{wanted} were requested, and this model has no head and no labels"):
            export(encoder, tmp_path / "m.onnx", output=wanted)
    with pytest.raises(ConfigError, match=r"no output is named 'labels'.*\n.*scores, logits, embedding, frames"):
        export(m, tmp_path / "m.onnx", output="labels")
    with pytest.raises(ConfigError, match=r"ends in \.onnx"):
        export(m, tmp_path / "m.pb")
    with pytest.raises(ConfigError, match=r"opset 17.*\n.*from 18 to 23"):
        export(m, tmp_path / "x.onnx", opset=17)
    (tmp_path / "d.onnx").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        export(m, tmp_path / "d.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["d.onnx"]
    (tmp_path / "e.onnx").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="already exists"):
        export(m, tmp_path / "e.onnx")
    assert (tmp_path / "e.onnx").read_bytes() == b"mine"


def louder(traced: Callable[..., onnx.ModelProto]) -> Callable[..., onnx.ModelProto]:
    def trace(*given: Any) -> onnx.ModelProto:
        graph = traced(*given)
        for one in graph.graph.initializer:
            if one.name == "fourier":
                one.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(one) * np.float32(1.1), one.name))
        return graph

    return trace


def refuse(*_: Any, **__: Any) -> None:
    raise torch.onnx.OnnxExporterError("no such thing\nand a long report")


def unsuited(exact: Run, coarse: Run) -> dict[str, Any]:
    silence = np.zeros((1, NEED), np.float32)
    assert not np.array_equal(exact(silence), coarse(silence))
    return {"of": "clips of mine", "sounds": 3, "cosine": 0.5}


NANS: Any = lambda *_: lambda waves: np.full((len(waves), 3), np.nan, np.float32)  # noqa: E731


@pytest.mark.parametrize(
    ("changed", "name", "value", "options", "error", "text"),
    [
        (file, "trace", louder, {}, CheckpointError, r"graph for m\.onnx differs from the model by .* for 1 waves"),
        (file, "_session", NANS, {}, CheckpointError, "not all finite"),
        (file, "LAYERS", "blocks.1", {"int8": True}, CheckpointError, r"6 linear layers in .*\n.*12, of the blocks"),
        (torch.onnx, "export", refuse, {}, ConfigError, r"write the model as ONNX: no such thing\n.*\n.*--to torch"),
        (file, "LEAST_COSINE", 0.9, {"int8": True, "measure": unsuited}, CheckpointError,
         r"for 3 clips of mine have a mean cosine of 0\.500"),
    ],
)  # fmt: skip
def test_a_faulty_graph_is_not_left(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    changed: Any, name: str, value: Any, options: dict[str, Any], error: type[Exception], text: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(changed, name, value(file.trace) if value is louder else value)
    with pytest.raises(error, match=text):
        export(make_model(width=16 if value is refuse else 32), tmp_path / "m.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "m.onnx").write_bytes(b"mine")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CheckpointError, match=r"the disk is full: .*m\.onnx was not written"):
        export(make_model(), tmp_path / "m.onnx", overwrite=True)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("m.onnx", b"mine")]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_extra_is_named(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}, which is not.*\n.*\n.*pip install 'asit-audio\[onnx\]'"):
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


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("container", ["WAV", "WAVEX"])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_the_example_reads_every_plain_wav(
    tmp_path: Path, repository: Path, channels: int, container: str, subtype: str
) -> None:
    example = runpy.run_path(str(repository / "examples" / "onnx_numpy.py"))
    clip = 0.5 * np.random.default_rng(3).uniform(-1, 1, (801, channels))
    soundfile.write(tmp_path / "x.wav", clip, 22050, format=container, subtype=subtype)
    want, _ = soundfile.read(tmp_path / "x.wav", dtype="float64", always_2d=True)
    got, rate = example["read_wav"](str(tmp_path / "x.wav"))
    assert rate == 22050
    np.testing.assert_allclose(got, want.mean(1), atol=1e-9)


def test_the_example_resamples_and_says_what_it_cannot_read(tmp_path: Path, repository: Path) -> None:
    example = runpy.run_path(str(repository / "examples" / "onnx_numpy.py"))
    for own, to in ((44100, 16000), (8000, 16000), (16000, 8000), (22050, 16000)):
        at = np.arange(own) / own
        wave = sum(np.sin(2 * np.pi * hz * at) for hz in (150, 1000, 3000)) * np.hanning(own)
        got, want = example["resample"](wave, own, to), soxr.resample(wave, own, to)
        assert abs(len(got) - len(want)) <= 1
        n = min(len(got), len(want))
        assert np.abs(got[:n] - want[:n]).max() < 2e-3
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 8000, subtype="ULAW")
    soundfile.write(tmp_path / "b.wav", np.zeros(100), 8000, format="FLAC")
    soundfile.write(tmp_path / "c.wav", np.full(100, np.nan), 8000, subtype="FLOAT")
    soundfile.write(tmp_path / "d.wav", np.zeros(0), 8000)
    for name, text in {"a": "codec 7 with 8 bits", "b": "is no WAV", "c": "not finite", "d": "no samples"}.items():
        with pytest.raises(SystemExit, match=text):
            example["read_wav"](str(tmp_path / f"{name}.wav"))


def test_the_example_needs_neither_torch_nor_asit(
    make_model: Any, make_waves: Any, tmp_path: Path, repository: Path
) -> None:
    m = make_model()
    export(m, tmp_path / "m.onnx")
    example = repository / "examples" / "onnx_numpy.py"
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
