"""The student as an ONNX file for onnxruntime, in float32 or int8: `save_best_checkpoint.py --onnx` and `--int8`.

The whole encoder as a graph of its own, its mixers in chunks of tokens; how it is built and how fast it is:
docs/speed.md. Needs requirements-eval.txt.
"""
from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import logging
import math
import sys
import types
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

import train_6layer_deltanet as script
from train_6layer_deltanet import DeltaNetStudent, UserError, write_atomic

ONNX_LENGTHS = (1, 5, 37, 128, 512, 2048)  # at which an export is compared with its student
EXAMPLES = ["A man is eating food.", "Someone is eating a meal.", "The cat sleeps on a red sofa.",
            "Stocks fell sharply on Monday.", "How do I learn to play the guitar?",
            "The committee will publish its report on water quality next week."]


class OnnxGraph:
    """Nodes of an ONNX graph in the making: `graph.MatMul(a, b)` adds a node and returns the name of its output.

    Arrays and numbers among the inputs become constants, each stored once. Bodies of If and Scan see what is outside.
    """

    def __init__(self) -> None:
        self.nodes, self.constants, self.names = [], {}, itertools.count()

    def inside(self) -> Any:
        """An empty graph for a body, which shares constants, names and everything known so far."""
        body = copy.copy(self)
        body.nodes = []
        return body

    def body(self, inputs: list[str], outputs: list[str]) -> Any:
        """The nodes as a body whose inputs and outputs are float tensors."""
        from onnx import TensorProto, helper
        infos = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
                 for names in (inputs, outputs))
        return helper.make_graph(self.nodes, f"body{next(self.names)}", *infos)

    def choose(self, condition: str, then: Callable[[Any], str], otherwise: Callable[[Any], str]) -> str:
        """If: each branch is a function from its graph to its result."""
        branches = []
        for branch in (then, otherwise):
            graph = self.inside()
            branches.append(graph.body([], [branch(graph)]))
        return self.If(condition, then_branch=branches[0], else_branch=branches[1])

    def constant(self, value: Any) -> str:
        """The name of an array: float32, or int64 of whole numbers."""
        from onnx import numpy_helper
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        array = np.array(array, np.float32 if array.dtype.kind == "f" else np.int64, order="C")
        key = array.dtype.char, array.shape, array.tobytes()
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(array, f"constant{len(self.constants)}")
        return self.constants[key].name

    def add(self, kind: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """A node; returns its output's name, or a list of `outputs` names."""
        from onnx import helper
        found = [f"{kind}{next(self.names)}" for _ in range(outputs)]
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        self.nodes.append(helper.make_node(kind, names, found, **attributes))
        return found if outputs > 1 else found[0]

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        if not kind[0].isupper():
            raise AttributeError(kind)
        return functools.partial(self.add, kind)

    def view(self, x: str, *dims: int | str) -> str:
        """x in another shape, of numbers (0 keeps, -1 is what is left) and names of tensors of one whole number."""
        if all(isinstance(d, int) for d in dims):
            return self.Reshape(x, list(dims))
        return self.Reshape(x, self.Concat(*([d] if isinstance(d, int) else d for d in dims), axis=0))

    def swapped(self, x: str, rank: int) -> str:
        """x of `rank` axes, the last two exchanged; onnxruntime fuses it into a product right behind (FusedMatMul)."""
        return self.Transpose(x, perm=[*range(rank - 2), rank - 1, rank - 2])

    def halves(self, x: str, axis: int) -> list[str]:
        return self.Split(x, axis=axis, num_outputs=2, outputs=2)


BLOCK, MERGES = 16, 3  # tokens of a block at most; 2**MERGES blocks of a text are one chunk, of a longer one 4
SIZES = [1 << bit for bit in range(BLOCK.bit_length() - 1)]  # 1, 2, 4, ... BLOCK / 2


class StudentGraph(OnnxGraph):
    """The student's ONNX graph: the parallel form of `chunk_hierarchical_delta_rule`, of standard operators (opset 23).

    A text is cut into equal blocks of at most BLOCK tokens: 1, 2, 4, 8, or chunks of 4. Attention inside a block comes
    from block substitution, neighbouring blocks are merged to a chunk, and only the states of chunks go through a Scan.
    Every head reads its tokens left to right: a Gather turns time around behind the convolution. Sequences lie as
    (chunks, B, H, blocks, C, K), C tokens of a block; scalars of a token as (BLOCK, N), N = chunks * B * H * blocks.
    """

    def __init__(self, student: DeltaNetStudent):
        super().__init__()
        self.student, self.cfg, self.heads = student, student.config, student.config.num_heads
        self.width = self.cfg.d_model // self.heads
        self.side = self.heads // (2 if self.cfg.bidirectional else 1)  # heads of a direction

    def model(self) -> Any:
        """The onnx.ModelProto: (input_ids, attention_mask) -> last_hidden_state and the unit sentence_embedding."""
        from onnx import TensorProto, helper
        s, mask = self.student, self.prepare("attention_mask")
        table, positions = s.word_embeddings.weight, s.position_embeddings.weight
        x = self.Gather(table if self.cfg.learned_positions else table + positions, "input_ids")
        if self.cfg.learned_positions:
            x = self.Add(x, self.Slice(positions, [0], self.length, [0]))

        def norm(x: str, layer: nn.LayerNorm, shift: Tensor) -> str:
            return self.LayerNormalization(x, layer.weight, layer.bias + shift, axis=-1, epsilon=layer.eps)

        # Each norm also adds the bias of the residual branch after it; that branch's first layer takes it off again.
        mixers = [mixer.o_proj.bias for mixer in s.deltanet_layers] + [torch.zeros(self.cfg.d_model)]
        x = norm(x, s.embedding_norm, mixers[0])
        for i, (mixer, ffn) in enumerate(zip(s.deltanet_layers, s.deltanet_ffns)):
            x = norm(self.Add(x, self.mixer(x, mixer, i, mixers[i])), s.deltanet_norms[i], ffn.down.bias)
            up = self.MatMul(x, ffn.up.weight.T, name=f"linear/{i}/up")
            up = self.Add(up, ffn.up.bias - ffn.up.weight @ ffn.down.bias)
            down = self.MatMul(self.Gelu(up), ffn.down.weight.T, name=f"linear/{i}/down")
            x = norm(self.Add(x, down), s.ffn_norms[i], mixers[i + 1])
        mean = self.Squeeze(self.MatMul(self.Unsqueeze(mask, [1]), x), [1])
        mean = self.Div(mean, self.Max(self.ReduceSum(mask, [1]), 1e-9))
        unit = self.Div(mean, self.Max(self.ReduceL2(mean, [1]), 1e-12))
        names = ("last_hidden_state", "sentence_embedding")
        self.nodes += [helper.make_node("Identity", [value], [name]) for name, value in zip(names, (x, unit))]
        rows, info = ["batch", "length"], helper.make_tensor_value_info
        inputs = [info(name, TensorProto.INT64, rows) for name in ("input_ids", "attention_mask")]
        outputs = [info(name, TensorProto.FLOAT, [*dims, self.cfg.d_model])
                   for name, dims in zip(names, (rows, rows[:1]))]
        graph = helper.make_graph(self.nodes, "student", inputs, outputs, list(self.constants.values()))
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)

    def prepare(self, mask: str) -> str:
        """What all layers share: sizes as tensors of one number, indices, constants; returns the mask as numbers."""
        shape, number = self.Shape(mask), lambda x: self.Squeeze(x, [0])
        up = lambda a, b: self.Div(self.Sub(self.Add(a, b), [1]), b)  # noqa: E731  a / b rounded up
        self.batch, self.length = self.Slice(shape, [0], [1]), self.Slice(shape, [1], [2])
        self.blocks = self.constant([1])
        for merge in range(MERGES):
            self.blocks = self.Where(self.Greater(self.length, [BLOCK << merge]), [2 << merge], self.blocks)
        self.blocks = self.Where(self.Greater(self.length, [BLOCK << MERGES]), [4], self.blocks)
        self.chunks = up(self.length, self.Mul(self.blocks, [BLOCK]))
        self.tokens = up(self.length, self.Mul(self.chunks, self.blocks))  # C
        self.one_block, self.one_chunk = (number(self.Equal(x, [1])) for x in (self.blocks, self.chunks))

        # Gathers take q, k and v out of rows (B, T, H, 3) and the gates out of (B, T, H), each head in its direction of
        # time; one puts back what the heads give, rows (chunks, B, H, size).
        size = self.Mul(self.blocks, self.tokens)  # tokens of a chunk
        text, head = self.view(self.Range(0, number(self.batch), 1), -1, 1, 1), np.arange(self.heads)
        last = self.Sub(self.length, [1])
        turned = lambda t, way: self.Add(t, self.Mul(self.Sub(last, self.Mul(t, [2])), way))  # noqa: E731

        time = self.view(self.Range(0, number(self.Mul(self.chunks, size)), 1), self.chunks, 1, 1, size)
        inside = self.Cast(self.Less(time, self.length), to=1)
        time = self.Min(time, last)  # a direction's last token fills up the last chunk
        token = self.Add(turned(time, head[:, None] // self.side), self.Mul(text, self.length))  # (chunks, B, H, size)
        own = self.Add(self.Mul(token, [self.heads]), head[:, None])
        self.of_qkv = [self.view(self.Add(self.Mul(own, [3]), [part]), -1) for part in range(3)]
        self.of_gates = self.view(self.by_token(own), -1)  # behind the C tokens any row does: `real` is 0 there
        place = turned(self.view(self.Range(0, number(self.length), 1), -1, 1), head // self.side)  # (T, H)
        chunk = self.Div(place, size)
        sequence = self.Add(self.Mul(self.Add(self.Mul(chunk, self.batch), text), [self.heads]), head)
        self.back = self.Add(self.Sub(place, self.Mul(chunk, size)), self.Mul(sequence, size))  # (B, T, H)

        mask = self.Cast(mask, to=1)
        self.mask = self.Unsqueeze(mask, [2])
        self.real = self.by_token(self.Mul(self.Gather(self.view(mask, -1), token, axis=0), inside))  # (BLOCK, N)
        self.is_real = self.Cast(self.real, to=9)
        # What `decay_products` starts from, and what stands above its diagonals.
        count = self.Slice(self.Shape(self.real), [1], [2])  # N
        self.right = self.Expand(1.0, self.Concat([2, 1, BLOCK, 1, 1], count, axis=0))
        self.zeros = [self.Expand(0.0, self.Concat([1, 1, BLOCK // (2 * n), n, n], count, axis=0)) for n in SIZES]

        i, j = np.indices((BLOCK, BLOCK))
        square = lambda x: self.cut(self.constant(1.0 * x), 0, 1)  # noqa: E731
        self.eye, self.lower = square(i == j), square(j <= i)
        # Where the second block of a pair meets the first, with the minus of the substitution.
        self.levels = [square(-1.0 * ((i // n % 2 == 1) & (i // n - 1 == j // n))) for n in SIZES]
        return mask

    def cut(self, x: str, *axes: int) -> str:
        """The first C of BLOCK tokens."""
        return self.Slice(x, [0] * len(axes), self.Concat(*[self.tokens] * len(axes), axis=0), list(axes))

    def by_token(self, x: str) -> str:
        """Scalars of tokens in the order of `sequences` -> (BLOCK, N), zeros behind the C tokens of a block."""
        # Pad without `axes`: behind a Transpose onnxruntime 1.32 moves one with them, and reads its pads out of bounds.
        x = self.Transpose(self.view(x, -1, self.tokens), perm=[1, 0])
        return self.Pad(x, self.Concat([0, 0], self.Sub([BLOCK], self.tokens), [0], axis=0))

    def sequences(self, x: str, *last: int | str) -> str:
        return self.view(x, self.chunks, self.batch, self.heads, self.blocks, *last)

    def mixer(self, x: str, layer: nn.Module, index: int, shift: Tensor) -> str:
        """A layer's mixing of x (B, T, D), which is `shift` above the layer's input; without the bias of o_proj."""
        # A column of ones carries the biases, so that the mask zeroes all that the convolution reads at padding.
        x = self.Concat(self.Mul(x, self.mask), self.mask, axis=2)
        q, k, v = self.project(x, layer, index, shift)
        psi = self.flux(k, v, layer) if self.cfg.resonance_flux else self.constant(np.full((1, 1), 0.5))
        beta, transition, read = self.coefficients(*self.gates(x, layer, shift), psi)
        c, ends = self.decay_products(transition, read)
        c = self.sequences(self.Transpose(c, perm=[2, 0, 1]), self.tokens, self.tokens)

        # A = tril(Q K^T D) (I + tril(K K^T D, -1))^-1, D = diag(beta). Block substitution: the inverse is exact on
        # diagonal blocks of size 1, 2, 4, ... in turn, and n is K K^T D times what it is so far.
        weighted = self.Mul(k, self.sequences(self.Transpose(self.cut(beta, 0), perm=[1, 0]), self.tokens, 1))
        keys = self.swapped(weighted, 6)
        n, inverse = self.MatMul(k, keys), None
        for level in self.levels:
            step = self.Add(self.Mul(n, level), self.eye)
            inverse = step if inverse is None else self.MatMul(inverse, step)
            if level != self.levels[-1]:
                n = self.MatMul(n, step)
        a = self.MatMul(self.Mul(self.MatMul(q, keys), self.lower), inverse)
        inner = self.Mul(a, c)

        def merged(g: Any) -> str:
            left, right, whole = ends(g)
            parts = {"o": g.MatMul(inner, v), "q": g.Sub(q, g.MatMul(a, k)), "k": k, "v": v,
                     "end": g.MatMul(g.swapped(inverse, 6), weighted),
                     "left": g.sequences(g.Transpose(left, perm=[2, 1, 0]), g.tokens, 2),
                     "right": g.sequences(g.Transpose(right, perm=[2, 0, 1]), 2, g.tokens),
                     "whole": g.sequences(g.Transpose(whole, perm=[2, 0, 1]), 2, 2)}
            return g.merge(parts, 1)

        o = self.choose(self.one_block, lambda g: g.MatMul(inner, v), merged)
        o = self.unit(o, self.width * 1e-6)
        o = self.view(self.Gather(self.view(o, -1, self.width), self.back, axis=0), self.batch, -1, self.cfg.d_model)
        weight = layer.o_proj.weight * layer.o_norm.flatten() * self.width ** 0.5  # the norm is of the mean square
        return self.MatMul(o, weight.T, name=f"linear/{index}/o")

    def unit(self, x: str, epsilon: float) -> str:
        """x / sqrt(sum(x^2) + epsilon); with two threads faster than RMSNormalization (onnxruntime 1.32)."""
        # Without keepdims: adding a number is 30 times as slow with a last axis of size 1.
        norm = self.Sqrt(self.Add(self.ReduceSumSquare(x, [-1], keepdims=0), epsilon))
        return self.Div(x, self.Unsqueeze(norm, [-1]))

    def columns(self, linear: nn.Linear, parts: int, shift: Tensor) -> Tensor:
        """The weight with its bias as the last row, (D + 1, out): columns ordered by head, part, channel."""
        weight = torch.cat([linear.weight, (linear.bias - linear.weight @ shift).unsqueeze(1)], 1)
        return weight.unflatten(0, (parts, self.heads, -1)).transpose(0, 1).flatten(0, 2).T

    def project(self, x: str, layer: nn.Module, index: int, shift: Tensor) -> list[str]:
        """q, k (normalised) and v."""
        qkv = self.MatMul(x, self.columns(layer.qkv_proj, 3, shift), name=f"linear/{index}/qkv")
        if self.cfg.short_convolution:  # of an image of height 1, channels last: onnxruntime fuses the transpositions
            taps = layer.conv_weight[:, :, :, 0, 0].permute(2, 1, 3, 0)
            past = nn.functional.pad(taps.flip(-1), (0, taps.shape[-1] - 1))  # tap i looks i tokens back
            # ... and ahead, where time is turned, which is done behind it.
            taps = torch.cat([past[:self.side], past[self.side:].flip(-1)]).reshape(3 * self.cfg.d_model, 1, 1, -1)
            qkv = self.Transpose(self.Unsqueeze(qkv, [1]), perm=[0, 3, 1, 2])
            reach = taps.shape[-1] // 2
            qkv = self.Conv(qkv, taps, group=len(taps), pads=[0, reach, 0, reach])
            qkv = self.Transpose(qkv, perm=[0, 2, 3, 1])
        qkv = self.view(self.Mul(qkv, self.Sigmoid(qkv)), -1, self.width)
        parts = (self.Gather(qkv, places, axis=0) for places in self.of_qkv)
        q, k, v = (self.sequences(y, self.tokens, self.width) for y in parts)
        return [self.unit(q, 1e-6), self.unit(k, 1e-6), v]

    def flux(self, k: str, v: str, layer: nn.Module) -> str:
        """Resonance flux psi (BLOCK, N)."""
        wk, wv, wu = layer.flux_in.weight.split([self.width, self.width, 1], 1)
        pair = self.Mul(self.MatMul(k, (layer.flux_bilinear * torch.exp(-layer.flux_log_temperature)).unsqueeze(1)), v)
        hidden = self.Add(self.MatMul(k, wk.T), self.MatMul(v, wv.T))
        hidden = self.Add(hidden, self.MatMul(pair, wu.expand(-1, self.width).T))
        bias = layer.flux_in.bias.expand(BLOCK, -1)  # longer rows are faster
        hidden = self.Add(hidden, self.cut(self.constant(bias), 0))
        hidden = self.Mul(hidden, self.Sigmoid(hidden))
        psi = self.view(self.MatMul(hidden, layer.flux_out.weight.T), -1)
        return self.by_token(self.Clip(self.Sigmoid(self.Add(psi, layer.flux_out.bias)), 0.01, 0.99))

    def gates(self, x: str, layer: nn.Module, shift: Tensor) -> list[str]:
        """beta (BLOCK, N), the retentions a and the read gates g, fast and slow (2, BLOCK, N)."""
        gates = self.view(self.Sigmoid(self.MatMul(x, self.columns(layer.gate_proj, 5, shift))), -1, 5)
        gates = self.view(self.Transpose(self.Gather(gates, self.of_gates, axis=0), perm=[1, 0]), 5, BLOCK, -1)
        beta, a, g = self.Split(gates, [1, 2, 2], axis=0, outputs=3)
        return [self.Squeeze(beta, [0]), a, g]

    def coefficients(self, beta: str, a: str, g: str, psi: str) -> tuple[str, str, str]:
        """beta (BLOCK, N), the transition (2, 2, BLOCK, N), the reads (1, 2, BLOCK, N)."""
        two = lambda fast, slow: np.array([fast, slow]).reshape(2, 1, 1)  # noqa: E731
        line = lambda slope, start: self.Add(self.Mul(psi, slope), start)  # noqa: E731
        kept = self.Where(self.is_real, self.Mul(a, line(two(-0.10, -0.05), 1.0)), 1.0)
        coupled = self.cfg.cross_timescale_coupling and self.cfg.hierarchical_memory
        kappa = self.Mul(self.real, line(0.10, 0.05) if coupled else 0.0)
        out = self.Unsqueeze(self.Mul(kappa, psi), [0])
        out = self.Mul(kept, self.Concat(out, self.Sub(kappa, out), axis=0))
        (f, s), (out_fast, out_slow) = self.halves(self.Sub(kept, out), 0), self.halves(out, 0)
        transition = self.view(self.Concat(f, out_fast, out_slow, s, axis=0), 2, 2, BLOCK, -1)
        if not self.cfg.read_gates:
            g = self.Expand(1.0, self.Shape(a))
        slow = self.cfg.hierarchical_memory
        read = self.Mul(g, line(two(0.3, -0.3 * slow), two(0.5, 0.5 * slow)))
        return self.Mul(beta, self.real), transition, self.Unsqueeze(read, [0])

    def decay_products(self, m: str, r: str) -> tuple[str, Callable[[Any], tuple[str, str, str]]]:
        """`decay_products` (delta_mixer.py) of a block, by doubling; nothing is reduced over an axis, which is slow.

        m (2, 2, BLOCK, N): M; r (1, 2, BLOCK, N): both reads. Returns c (C, C, N), and what puts left (2, C, N),
        right (2, C, N) and whole (2, 2, N) into a graph that needs them.

        Matrices and vectors are (rows, columns, pieces, ...). Tokens stand in bit-reversed order, 0, 8, 4, 12, ..., so
        that the two halves of the pieces are the even and the odd ones, and none of many small tensors is reshaped.
        """
        def product(g: Any, a: list[str], b: list[str]) -> str:
            return g.Add(*(g.Mul(column, row) for column, row in zip(a, b)))

        order = [int(f"{i:0{len(SIZES)}b}"[::-1], 2) for i in range(BLOCK)]
        m, r = (self.Unsqueeze(self.Gather(x, order, axis=2), [3, 4]) for x in (m, r))  # m (2, 2, pieces, 1, 1, N)
        left = product(self, self.halves(r, 1), self.halves(m, 0))  # (1, 2, pieces, size, 1, N)
        right = self.right  # (2, 1, pieces, 1, size, N)
        c = self.Add(*self.halves(r, 1))  # (1, 1, pieces, size, size, N)
        for zeros in self.zeros:
            (left1, left2), (right1, right2), (m1, m2), (c1, c2) = (self.halves(x, 2) for x in (left, right, m, c))
            left2_columns, right1_rows = self.halves(left2, 1), self.halves(right1, 0)
            across = product(self, left2_columns, right1_rows)
            c = self.Concat(self.Concat(c1, zeros, axis=4), self.Concat(across, c2, axis=4), axis=3)

            def joined(g: Any) -> tuple[str, str, str]:
                m1_rows, m2_columns = g.halves(m1, 0), g.halves(m2, 1)
                return (g.Concat(left1, product(g, left2_columns, m1_rows), axis=3),
                        g.Concat(product(g, m2_columns, right1_rows), right2, axis=4), product(g, m2_columns, m1_rows))

            if zeros != self.zeros[-1]:
                left, right, m = joined(self)

        # What `joined` sees is still what the last round left.
        def ends(g: Any) -> tuple[str, str, str]:
            left, right, m = joined(g)
            return *(g.cut(g.view(x, 2, BLOCK, -1), 1) for x in (left, right)), g.view(m, 2, 2, -1)

        return self.cut(self.view(c, BLOCK, BLOCK, -1), 0, 1), ends

    def merge(self, parts: dict[str, str], count: int) -> str:
        """o of all tokens of a chunk: neighbouring blocks, `count` of the first ones each, are merged to one.

        parts: o, what a block reads of itself; q, its queries as they reach what is before it (rows H_1 ... H_t q_t);
        k; end, its writes as they are at its end (rows beta_j H_C ... H_{j+1} k_j); v; decays left, right, whole.
        """
        size = self.Mul(self.tokens, [count])
        rows = {"right": 2, "whole": 2}
        pair = {name: self.view(x, self.chunks, self.batch, self.heads, -1, 2, rows.get(name, size),
                                size if name == "right" else 2 if name in ("left", "whole") else self.width)
                for name, x in parts.items()}  # (chunks, B, H, pairs, 2, ., .)
        first = lambda name, g=self: g.Gather(pair[name], [0], axis=4)  # noqa: E731
        second = lambda name, g=self: g.Gather(pair[name], [1], axis=4)  # noqa: E731
        q2, end1, left2, right1 = second("q"), first("end"), second("left"), first("right")
        across = self.MatMul(q2, self.swapped(end1, 7))
        o2 = self.Add(second("o"), self.MatMul(self.Mul(across, self.MatMul(left2, right1)), first("v")))
        own = lambda g: g.Concat(first("o", g), o2, axis=5)  # noqa: E731
        if 2 * count == 2 ** MERGES:
            return own(self)

        def further(g: Any) -> str:
            k1, m1 = first("k", g), first("whole", g)
            k2, end2, m2 = second("k", g), second("end", g), second("whole", g)
            new = {"o": own(g), "k": pair["k"], "v": pair["v"],
                   "q": g.Concat(first("q", g), g.Sub(q2, g.MatMul(across, k1)), axis=5),
                   "end": g.Concat(g.Sub(end1, g.MatMul(g.MatMul(end1, g.swapped(k2, 7)), end2)), end2, axis=5),
                   "left": g.Concat(first("left", g), g.MatMul(left2, m1), axis=5),
                   "right": g.Concat(g.MatMul(m2, right1), second("right", g), axis=6), "whole": g.MatMul(m2, m1)}
            if count == 1:
                return g.merge(new, 2)
            return g.choose(g.one_chunk, lambda h: h.merge(new, 2 * count), lambda h: h.scan(new, h.Mul(size, [2])))

        done = self.And(self.one_chunk, self.Squeeze(self.Equal(self.blocks, [2 * count]), [0]))
        return self.choose(done, own, further)

    def scan(self, parts: dict[str, str], size: str) -> str:
        """o of the chunks, one block each now (as in `merge`), with what they read of the chunks before them."""
        view = lambda name, *last: self.view(parts[name], self.chunks, self.batch, self.heads, *last)  # noqa: E731
        width, both = self.width, 2 * self.width
        parts = parts | {"q": self.Mul(view("q", size, 1, width), view("left", size, 2, 1))}
        written = self.Mul(view("right", 2, size, 1), view("v", 1, size, width))
        start = self.Expand(0.0, self.Concat(self.batch, [self.heads], [2], [width], [width], axis=0))
        step = self.inside()
        state, *at = names = [f"step{next(self.names)}" for _ in range(6)]
        read = step.MatMul(at[0], step.view(state, 0, 0, both, width))
        mixed = step.view(step.MatMul(at[4], step.view(state, 0, 0, 2, width * width)), 0, 0, 2, width, width)
        new = step.Add(mixed, step.MatMul(step.swapped(at[2], 5), step.Sub(at[3], step.MatMul(at[1], mixed))))
        each = [view("q", size, both), view("k", 1, size, width), view("end", 1, size, width), written]
        each.append(view("whole", 2, 2))
        _, carried = self.Scan(start, *each, body=step.body(names, [new, read]), num_scan_inputs=len(each), outputs=2)
        return self.Add(view("o", size, width), carried)


class OnnxModel(nn.Module):
    """An ONNX file as a model that `encode` takes: (input_ids, attention_mask) -> last_hidden_state.

    threads: of a session; 0: all cores.
    """

    def __init__(self, path: Path, threads: int = 0):
        import onnxruntime
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # `encode` asks a parameter for the device
        self.config = types.SimpleNamespace(hidden_size=self.session.get_outputs()[0].shape[-1])

    def run(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """last_hidden_state (B, T, D) and sentence_embedding (B, D)."""
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return [torch.from_numpy(x) for x in self.session.run(["last_hidden_state", "sentence_embedding"], inputs)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.run(input_ids, attention_mask)[0])


def need(*packages: str) -> None:
    """UserError naming the first package that is not installed."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed; pip install -r requirements-eval.txt")


@torch.no_grad()
def write_onnx(student: DeltaNetStudent, path: Path) -> None:
    """The student as an ONNX file of dynamic batch and length, unchecked."""
    import onnx
    onnx.save(StudentGraph(student.eval()).model(), path)


@torch.no_grad()
def export_onnx(student: DeltaNetStudent, path: Path, scratch: Path) -> dict[str, float]:
    """Write `path`; returns by how much onnxruntime differs from the student at each length; UserError from 1e-4 on."""
    need("onnx", "onnxruntime")
    temporary = scratch / path.name
    write_onnx(student, temporary)
    model, result, generator = OnnxModel(temporary), {}, torch.Generator().manual_seed(0)
    limit = student.config.max_positions if student.config.learned_positions else math.inf
    for length in (n for n in ONNX_LENGTHS if n <= limit):
        ids = torch.randint(student.config.vocab_size, (3, length), generator=generator)
        ids[2] = ids[2, 0]  # one token, again and again
        mask = (torch.arange(length) < torch.tensor([[length], [max(1, length // 2)], [length]])).long()
        hidden = student(ids, mask).last_hidden_state
        found, embedding = model.run(ids, mask)
        # What stands at padding is nobody's.
        differences = (found - hidden)[mask.bool()], embedding - script.mean_pool(hidden, mask)
        result[f"onnx_error_{length}"] = max(x.abs().max().item() for x in differences)
    if not max(result.values()) < 1e-4:
        raise UserError(f"{path}: onnxruntime differs from the student by {max(result.values()):.1e}; not written")
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, lambda file: file.write(temporary.read_bytes()))
    return result


def quantise_onnx(source: Path, path: Path, prefix: str = "linear/") -> None:
    """The weights of the products named `prefix`... in int8, a scale a column; their inputs are quantised when it runs.

    The weights are 7 bits wide: processors without VNNI add two products in 16 bits, which 8 bits overflow.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    model, level = onnx.load(source), logging.getLogger().level
    names = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.name.startswith(prefix)]
    logging.getLogger().setLevel(logging.ERROR)  # of a pre-processing that changes nothing here
    try:
        quantize_dynamic(model, path, nodes_to_quantize=names, op_types_to_quantize=["MatMul"],
                         weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
    finally:
        logging.getLogger().setLevel(level)
    # With the shapes that this inferred, onnxruntime fuses additions into SkipLayerNormalization, which is slower.
    model = onnx.load(path)
    model.graph.ClearField("value_info")
    onnx.save(model, path)


def export_int8(tokenizer: Any, source: Path, path: Path, scratch: Path, cfg: dict[str, Any],
                given: bool) -> dict[str, float]:
    """Write `path`, the file `source` in int8; returns the lowest cosine to float32 over EXAMPLES, both dev Spearmans.

    Dev is what `cfg` names, if its data_dir was `given` or is at hand. UserError if STS-B dev loses more than 0.004.
    """
    temporary = scratch / path.name
    quantise_onnx(source, temporary)
    models = {"onnx": OnnxModel(source), "int8": OnnxModel(temporary)}
    vectors = [script.encode(model, tokenizer, EXAMPLES) for model in models.values()]
    result = {"int8_cosine": float((vectors[0] * vectors[1]).sum(1).min())}
    name = script.evaluation_name(cfg)
    if given or (Path(cfg["data_dir"]) / "sts" / f"{name}-dev.tsv.gz").is_file():
        rows = script.load_sts(cfg, "dev")
        for kind, model in models.items():
            result[f"{kind}_dev_spearman"] = script.evaluate_sts(model, tokenizer, rows)["spearman"]
        lost = result["onnx_dev_spearman"] - result["int8_dev_spearman"]
        if name == "stsb" and not lost <= 0.004:
            raise UserError(f"{path}: loses {lost:.4f} of Spearman on STS-B dev, more than 0.004; it was not written")
    else:
        print(f"note: no {name} dev set at hand (set --data_dir); int8 was checked on {len(EXAMPLES)} sentences alone",
              file=sys.stderr)
    write_atomic(path, lambda file: file.write(temporary.read_bytes()))
    return result
