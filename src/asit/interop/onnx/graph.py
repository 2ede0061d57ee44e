"""The ONNX graph of a model, node by node: waveform, log-mel, patches, transformer, output.

Written out and not traced: nodes keep readable names, the file does not depend on torch's version, the choice of what
is int8 is made where a layer is written, and a graph takes a second where torch's exporter takes ten. It is the
function of `asit.interop.exportable`, with which every file is compared before it is left on the disk. Operators are
of the ONNX standard alone.

Letters: B rows, S samples, T frames, W samples a window, N samples of the Fourier transform, F mel bins, P patches,
t columns of patches, D width, C classes. A token's row in (B tokens, D) keeps its place through the transformer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from asit.audio.fbank import FLOOR, mel_bank
from asit.interop.exportable import CUBIC, Output, extent_of
from asit.interop.onnx.nodes import Nodes
from asit.model.audio_model import AudioModel
from asit.model.classifier import Head
from asit.model.vit import Block

if TYPE_CHECKING:
    import onnx

INPUT = "waveform"
OPSETS = range(18, 24)
"""Versions of the standard operators that a graph can be written in."""
LEVELS = 63
"""Largest whole number of an int8 weight. Kernels for CPUs without VNNI add pairs of products in 16 bits: 255 x 64 x 2
is the most that fits, so with weights of 7 bits every CPU gives the same answer."""

LEAST_GELU = -0.17
"""No value of GELU is less: its minimum is -0.16997, at -0.7518."""


def build(model: AudioModel, output: Output, *, int8: bool, opset: int) -> onnx.ModelProto:
    """The graph with its weights: input "waveform" (batch, samples) float32, one output, named as it is.

    Args:
        model: on the CPU.
        output: of `output_of`.
        int8: the linear layers of the blocks in int8; everything else stays float32.
        opset: one of `OPSETS`.
    """
    from onnx import TensorProto, helper

    writer = _Writer(model, output, int8, opset)
    last = writer.write()
    classes = len(model.classes or ())
    shape: list[Any] = {
        "scores": ["batch", classes],
        "logits": ["batch", classes],
        "embedding": ["batch", model.encoder.width],
        "frames": ["batch", "columns", model.encoder.width],
    }[output]
    g = writer.g
    g.nodes.append(helper.make_node("Identity", [last], [output], name=output))
    graph = helper.make_graph(
        g.nodes,
        "asit",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", "samples"])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
        list(g.constants.values()),
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(
        graph, opset_imports=opsets, producer_name="asit", ir_version=helper.find_min_ir_version_for(opsets)
    )


@dataclass(frozen=True)
class _Rows:
    """Rows (B tokens, K) that linear layers read: x, or in int8 whole numbers with x = scale (rows - zero) + taken."""

    rows: str
    scale: str = ""
    zero: int = 0
    taken: float = 0.0


class _Writer:
    """Writes the parts of the graph one after the other."""

    def __init__(self, model: AudioModel, output: Output, int8: bool, opset: int) -> None:
        self.model, self.output, self.int8, self.opset = model, output, int8, opset
        self.extent = extent_of(model, output)
        self.g = Nodes()

    def write(self) -> str:
        """All of it; gives the name of the output."""
        encoder, g = self.model.encoder, self.g
        self._sizes()
        g.room = "logmel"
        x = self._logmel()
        g.room = "patches"
        x = self._patches(x)
        for i, block in enumerate(encoder.blocks):
            assert isinstance(block, Block)
            x = self._block(x, block, f"block{i}")
        g.room = "output"
        x = self._norm(x, encoder.norm, "norm")
        tokens = g("Reshape", x, self._shape(-1, encoder.width), name="tokens")
        return self._answer(tokens)

    # --- sizes ---------------------------------------------------------------------------------------------------

    def _sizes(self) -> None:
        """Columns and frames of the input's length, as int64 tensors (1,): `Extent.columns` in the graph."""
        g, e = self.g, self.extent
        g.room = "sizes"
        self.batch = g("Shape", INPUT, start=0, end=1, name="batch")
        self.samples = g("Shape", INPUT, start=1, end=2, name="samples")
        # ONNX rounds quotients toward zero, so what would be negative is lifted first.
        before = e.window - e.shift
        enough = g("Max", self.samples, g.ints(before))
        self.heard = g("Div", g("Sub", enough, g.ints(before)), g.ints(e.shift), name="heard")
        twice = g("Add", g("Mul", self.heard, g.ints(2)), g.ints(3 * e.step - 2 * (e.patch + e.slack)))
        whole = g("Div", g("Max", twice, g.ints(0)), g.ints(2 * e.step))
        self.columns = g("Max", whole, g.ints(e.least), name="columns")
        # The scale of the positions, looked up so that a runtime refuses more columns than there may be.
        scales = [e.view / max(columns, e.view) for columns in range(e.most + 1)]
        table = g.constant(np.array(scales, np.float32), "scales")
        seconds = e.longest / self.model.rate
        self.scale = g("Gather", table, self.columns, name=f"inputs_may_have_{seconds:.2f}_seconds_at_most")
        self.frames = g(
            "Add", g("Mul", self.columns, g.ints(e.step)), g.ints(e.patch - e.step), name="frames"
        )  # fmt: skip

    # --- log-mel -------------------------------------------------------------------------------------------------

    def _logmel(self) -> str:
        """Normalised log-mel (B, 1, T, F)."""
        g, e, settings = self.g, self.extent, self.model.front_end.settings
        x = self._frames(self._filled())
        x = g("Sub", x, g("ReduceMean", x, g.ints(-1), name="mean"))
        first, head = g.cut(x, g.ints(0), g.ints(1), 2), g.cut(x, g.ints(0), g.ints(-1), 2)
        before = g("Concat", first, head, axis=2)
        x = g("Sub", x, g("Mul", before, g.real(settings.preemphasis)), name="preemphasis")
        x = g("Mul", x, g.constant(self.model.front_end.hann.cpu().numpy(), "hann"), name="hann")
        cos_sin, bank = _tables(mel_bank(settings), e.window)
        spectrum = g("MatMul", x, g.constant(cos_sin, "fourier"), name="fourier")
        energy = g("MatMul", g("Mul", spectrum, spectrum, name="power"), g.constant(bank, "mel_bank"), name="mel")
        x = g("Log", g("Max", energy, g.real(FLOOR)))
        if settings.padding == "zero":
            places = g("Range", self._scalar(g.ints(0)), self._scalar(self.frames), self._scalar(g.ints(1)))
            own = g("Less", places, g("Max", self.heard, g.ints(1)))
            x = g("Where", g("Unsqueeze", own, g.ints(1)), x, g.real(0.0), name="zeros")
        x = g("Div", g("Sub", x, g.real(float(settings.mean))), g.real(2 * float(settings.std)), name="normalised")
        return g("Unsqueeze", x, g.ints(1))

    def _filled(self) -> str:
        """The waves (B, hops x shift), cut or filled up to whole hops that hold the frames."""
        g, e = self.g, self.extent
        hops = g("Add", self.frames, g.ints(e.window // e.shift))
        need = g("Mul", hops, g.ints(e.shift), name="need")
        if self.model.front_end.settings.padding == "repeat":
            places = g("Range", self._scalar(g.ints(0)), self._scalar(need), self._scalar(g.ints(1)))
            return g("Gather", INPUT, g("Mod", places, self.samples), axis=1, name="repeat")
        missing = g("Max", g("Sub", need, self.samples), g.ints(0))
        pads = g("Concat", g.ints(0, 0, 0), missing, axis=0)
        return g.cut(g("Pad", INPUT, pads, name="silence"), g.ints(0), need, 1)

    def _frames(self, waves: str) -> str:
        """Overlapping frames (B, T, W), put together from pieces of one hop."""
        g, e = self.g, self.extent
        hops = g("Reshape", waves, g.ints(0, -1, e.shift))
        whole, rest = divmod(e.window, e.shift)
        parts = [g.cut(hops, g.ints(i), g("Add", self.frames, g.ints(i)), 1) for i in range(whole)]
        if rest:
            part = g.cut(hops, g.ints(whole), g("Add", self.frames, g.ints(whole)), 1)
            parts.append(g.cut(part, g.ints(0), g.ints(rest), 2))
        return g("Concat", *parts, axis=2, name="windows")

    # --- tokens --------------------------------------------------------------------------------------------------

    def _patches(self, x: str) -> str:
        """The transformer's input (B tokens, D): prefix and patches with their positions."""
        g, encoder = self.g, self.model.encoder
        width, prefix = encoder.width, encoder.prefix
        weight, bias = encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias
        assert bias is not None, "PatchEmbed has one"
        sides: dict[str, Any] = {"kernel_shape": list(encoder.patch), "strides": list(encoder.stride)}
        x = g("Conv", x, self._weight(weight, "weight"), self._weight(bias, "bias"), name="project", **sides)
        x = g("Transpose", g("Reshape", x, g.ints(0, width, -1)), perm=[0, 2, 1])
        x = g("Add", x, self._positions())
        names = ("cls_token", "dist_token")[:prefix]
        first = torch.cat([getattr(encoder, name) for name in names], dim=1) + encoder.pos_embed[:, :prefix]
        rows = g("Concat", self.batch, g.ints(prefix, width), axis=0)
        tokens = g("Concat", g("Expand", self._weight(first, "prefix.weight"), rows), x, axis=1)
        self.heads_shape = self._shape(-1, encoder.heads, width // encoder.heads)
        return g("Reshape", tokens, g.ints(-1, width), name="tokens")

    def _positions(self) -> str:
        """Positions of the patches (1, P, D), as `exportable.Waveform` has them."""
        g, encoder = self.g, self.model.encoder
        own = encoder.pos_embed[0, encoder.prefix :].unflatten(0, encoder.grid).flatten(1)
        table = self._weight(own, "positions.weight")
        places = g("Range", self._scalar(g.ints(0)), self._scalar(self.columns), self._scalar(g.ints(1)))
        centre = g("Add", g("Cast", places, to=1), g.real(0.5))
        place = g("Sub", g("Mul", centre, self.scale), g.real(0.5), name="place")
        low = g("Floor", place)
        past = g("Sub", place, low)
        mixed = ""
        for i, weight in enumerate(self._cubic(past)):
            index = g("Cast", g("Add", low, g.real(i - 1)), to=7)
            index = g("Min", g("Max", index, g.ints(0)), g.ints(self.extent.view - 1))
            part = g("Mul", g("Gather", table, index, axis=0), g("Unsqueeze", weight, g.ints(1)))
            mixed = g("Add", mixed, part) if mixed else part
        return g("Reshape", mixed, g.ints(1, -1, encoder.width), name="positions")

    def _cubic(self, past: str) -> list[str]:
        """Weights of four neighbours, as `exportable.cubic_weights`."""
        g = self.g

        def polynomial(x: str, a: float, b: float, c: float, d: float) -> str:
            """((a x + b) x + c) x + d."""
            y = g("Add", g("Mul", x, g.real(a)), g.real(b))
            y = g("Add", g("Mul", y, x), g.real(c))
            return g("Add", g("Mul", y, x), g.real(d))

        rest = g("Sub", g.real(1.0), past)
        inner = [polynomial(x, CUBIC + 2.0, -(CUBIC + 3.0), 0.0, 1.0) for x in (past, rest)]
        far = [g("Add", x, g.real(1.0)) for x in (past, rest)]
        outer = [polynomial(x, CUBIC, -5.0 * CUBIC, 8.0 * CUBIC, -4.0 * CUBIC) for x in far]
        return [outer[0], *inner, outer[1]]

    # --- transformer ---------------------------------------------------------------------------------------------

    def _block(self, x: str, block: Block, room: str) -> str:
        g, width, heads = self.g, self.model.encoder.width, self.model.encoder.heads
        g.room = f"{room}/attention"
        h = self._input(self._norm(x, block.norm1, "norm"))
        weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        # The factor of the scaled product lies in the queries' weights.
        factors = ((width // heads) ** -0.5, 1.0, 1.0)
        parts = []
        for name, weight, bias, factor in zip(("query", "key", "value"), weights, biases, factors, strict=True):
            part = self._linear(h, weight * factor, bias * factor, name)
            turned = [0, 2, 3, 1] if name == "key" else [0, 2, 1, 3]
            parts.append(g("Transpose", g("Reshape", part, self.heads_shape), perm=turned))
        attention = g("Softmax", g("MatMul", parts[0], parts[1], name="products"), axis=-1)
        mixed = g("Transpose", g("MatMul", attention, parts[2], name="mixed"), perm=[0, 2, 1, 3])
        h = self._input(g("Reshape", mixed, g.ints(-1, width)))
        x = g("Add", x, self._linear(h, block.attn.proj.weight, block.attn.proj.bias, "project"), name="sum")
        g.room = f"{room}/mlp"
        h = self._input(self._norm(x, block.norm2, "norm"))
        hidden = self._gelu(self._linear(h, block.mlp.fc1.weight, block.mlp.fc1.bias, "first"))
        last = self._linear(self._input(hidden, LEAST_GELU), block.mlp.fc2.weight, block.mlp.fc2.bias, "second")
        return g("Add", x, last, name="sum")

    def _norm(self, x: str, norm: nn.LayerNorm, name: str) -> str:
        scale, shift = self._weight(norm.weight, f"{name}.weight"), self._weight(norm.bias, f"{name}.bias")
        return self.g("LayerNormalization", x, scale, shift, axis=-1, epsilon=norm.eps, name=name)

    def _gelu(self, x: str) -> str:
        g = self.g
        if self.opset >= 20:
            return g("Gelu", x)
        half = g("Mul", g("Erf", g("Mul", x, g.real(2.0**-0.5))), g.real(0.5))
        return g("Mul", x, g("Add", half, g.real(0.5)))

    def _input(self, x: str, least: float | None = None) -> _Rows:
        """What linear layers read.

        In int8 each token is quantised by its own values, so that no clip depends on the others of its batch: from
        -max |x| to max |x|, or, where no value can be less than `least`, from there to the largest.
        """
        if not self.int8:
            return _Rows(x)
        from onnx import TensorProto, helper

        g = self.g
        if least is None:
            spread, zero, levels = g("Abs", x), 128, 127
        else:
            x = spread = g("Sub", x, g.real(least))
            zero, levels = 0, 255
        largest = g("ReduceMax", spread, g.ints(1), keepdims=0)
        scale = g("Max", g("Mul", largest, g.real(1 / levels)), g.real(1e-30), name="scale")
        middle = helper.make_tensor("middle", TensorProto.UINT8, [1], [zero])
        zeros = g("ConstantOfShape", g("Shape", scale), value=middle)
        whole = g("QuantizeLinear", x, scale, zeros, axis=0)
        return _Rows(whole, g("Unsqueeze", scale, g.ints(1)), zero, least or 0.0)

    def _linear(self, x: _Rows, weight: Tensor, bias: Tensor, name: str) -> str:
        """A linear layer on rows; weight (out, in) and bias (out,) as torch has them."""
        g = self.g
        if not self.int8:
            shift = self._weight(bias, f"{name}.bias")
            return g("Gemm", x.rows, self._weight(weight.t(), f"{name}.weight"), shift, name=name)
        whole, scales = quantised(weight)
        # What was taken from every value comes back as a part of the bias.
        taken = torch.from_numpy(whole.sum(0, dtype=np.int64) * scales * x.taken).float()
        shift = self._weight(bias.detach().cpu() + taken, f"{name}.bias")
        held = g.constant(whole, f"{g.room}/{name}.weight")
        product = g("MatMulInteger", x.rows, held, g.constant(np.uint8(x.zero)), name=name)
        real = g("Mul", g("Cast", product, to=1), x.scale)
        return g("Add", g("Mul", real, g.constant(scales, f"{g.room}/{name}.scale")), shift)

    # --- output --------------------------------------------------------------------------------------------------

    def _answer(self, tokens: str) -> str:
        g, encoder, prefix = self.g, self.model.encoder, self.model.encoder.prefix
        end = g.ints(np.iinfo(np.int64).max)
        patches = g.cut(tokens, g.ints(prefix), end, 1)
        if self.output == "frames":
            columns = g("Reshape", patches, g.ints(0, -1, encoder.grid[1], encoder.width))
            return g("ReduceMean", columns, g.ints(2), keepdims=0, name="mean")
        mean = g("ReduceMean", patches, g.ints(1), keepdims=0, name="mean")
        if self.output == "embedding":
            return mean
        head = self.model.head
        assert isinstance(head, Head), "output_of refused it"
        first = g.cut(tokens, g.ints(0), g.ints(prefix), 1)
        token = g("ReduceMean", first, g.ints(1), keepdims=0, name="class_token")
        read = {"class": [token], "mean": [mean], "class+mean": [token, mean]}[head.pooling]
        x = read[0] if len(read) == 1 else g("Concat", *read, axis=1)
        g.room = "head"
        if head.norm is not None:
            x = self._norm(x, head.norm, "norm")
        weight, bias = self._weight(head.linear.weight.t(), "weight"), self._weight(head.linear.bias, "bias")
        logits = g("Gemm", x, weight, bias, name="logits")
        if self.output == "logits":
            return logits
        return g("Sigmoid", logits) if self.model.multi else g("Softmax", logits, axis=-1)

    # --- parts ---------------------------------------------------------------------------------------------------

    def _weight(self, value: Tensor, name: str) -> str:
        array = np.ascontiguousarray(value.detach().cpu().float().numpy())
        return self.g.constant(array, f"{self.g.room}/{name}")

    def _shape(self, *sizes: int) -> str:
        """A shape (B, *sizes) for Reshape."""
        return self.g("Concat", self.batch, self.g.ints(*sizes), axis=0)

    def _scalar(self, one: str) -> str:
        return self.g("Squeeze", one)


def quantised(weight: Tensor) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """A weight (out, in) in int8: whole numbers (in, out) of `LEVELS` at most, and each output's scale (out,).

    Symmetric, one scale an output, by the largest weight: what onnxruntime's `quantize_dynamic` does per channel.
    """
    array = weight.detach().cpu().float().numpy()
    scale = np.maximum(np.abs(array).max(1) / LEVELS, np.float32(1e-30)).astype(np.float32)
    whole = np.rint(array / scale[:, None]).clip(-LEVELS, LEVELS).astype(np.int8)
    return np.ascontiguousarray(whole.T), scale


def _tables(bank: Tensor, window: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The Fourier transform of a real frame as a matrix (W, 2 K), cosines and then sines, and the mel bank (2 K, F)
    for its squares, of the K bins alone that some mel bin reads.

    onnxruntime's DFT takes 9 ms for 10 s of sound where the product takes 3.5, and is four times as far off.
    """
    used = np.flatnonzero(bank.sum(1).numpy() > 0)
    bins = np.arange(used[0], used[-1] + 1) if len(used) else np.arange(1)
    size = 2 * (len(bank) - 1)
    # Whole turns are taken out before the angle is made: exact in float64 at any length.
    turns = np.arange(window)[:, None] * bins[None] % size
    angle = 2 * np.pi * turns / size
    table = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    rows = bank.numpy()[bins]
    return table, np.concatenate([rows, rows]).astype(np.float32)
