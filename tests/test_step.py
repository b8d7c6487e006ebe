"""One optimiser step: it waits for nothing, a bad one changes nothing, its operators and memory are what it says."""
from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

import train_6layer_deltanet as script
from detect_hardware import make_batch

SYNCHRONISING = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero",
                 "aten::unique", "aten::_unique", "aten::masked_select", "aten::repeat_interleave.Tensor")


class NoWaiting(TorchDispatchMode):
    """Fails where a GPU's host would wait: a number is read, or a shape depends on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, indices = function.name(), args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        masks = [i for i in indices if isinstance(i, torch.Tensor) and i.dtype == torch.bool]
        by_mask = name.startswith("aten::index") and masks
        assert not name.startswith(SYNCHRONISING) and not by_mask, name
        return function(*args, **(kwargs or {}))


def setting(device: str = "cpu", tokens: int = 12, **changes: Any,
            ) -> tuple[script.Trainer, torch.optim.AdamW, list[script.MicroBatch]]:
    """A trainer of a small student with dropout, its optimiser, and a batch with padding and hard negatives.

    With more than 512 `tokens` a text at most, they are documents, which the teacher reads in windows.
    """
    small = {"d_model": 32, "num_heads": 2, "num_layers": 2, "batch_size": 6, "max_length": 12}
    cfg = script.check_config(script.config | small | changes)
    torch.manual_seed(0)
    shapes = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    teacher = script.Teacher(BertModel(shapes, add_pooling_layer=False)).to(device)
    trainer = script.Trainer(script.build_student(cfg, teacher).to(device).train(), teacher, cfg)
    trainer.packs = False  # as on a GPU
    trainer.distances = torch.zeros(2, 3, dtype=torch.float64, device=device)
    batch = make_batch(cfg | {"max_length": tokens})
    for micro in batch:
        (ids, mask), pairs = micro.groups[0], micro.pairs
        mask[::2, 9:] = 0
        micro.groups, micro.strata = [(ids, mask), (ids[:1, :8], mask[:1, :8])], torch.arange(pairs) % 3
        micro.lengths, micro.long = [m.sum(1).tolist() for _, m in micro.groups], tokens > 512
        micro.keys, micro.restore = torch.cat([micro.keys, micro.keys[:1]]), torch.arange(2 * pairs + 1).flip(0)
    return trainer, script.build_optimizer(trainer.student, cfg), batch


def step(trainer: script.Trainer, optimizer: torch.optim.AdamW, batch: list[script.MicroBatch], spoilt: bool = False,
         rate: float = 1e-3) -> torch.Tensor:
    optimizer.zero_grad(set_to_none=True)
    values = trainer.step_gradients(batch, 1)
    if spoilt:
        trainer.student.ffn_norms[0].weight.grad[3] = float("nan")
    return script.update(optimizer, values.values(), rate, trainer.cfg["gradient_clip"], trainer.processes)


CONFIGS = [{}, {"gradient_accumulation_steps": 1}, {"guided_contrastive": True}, {"tokens": 600}]


@pytest.mark.parametrize("changes", CONFIGS)
def test_a_step_never_waits_for_the_device(changes):
    trainer, optimizer, batch = setting(**changes)
    batch = trainer.upload(batch)
    with NoWaiting():
        row = step(trainer, optimizer, batch)
    assert row.isfinite().all() and len(row) >= 8 and trainer.distances[1].sum() == 6
    for waits in (lambda x: x[x > 0], lambda x: x.sum().item(), lambda x: x.unique(), lambda x: bool(x.any())):
        with pytest.raises(AssertionError), NoWaiting():
            waits(row)


@pytest.mark.skipif(not torch.cuda.is_available(),
                    reason="no CUDA GPU here: that PyTorch sees no synchronisation is not tested")
@pytest.mark.parametrize("changes", CONFIGS)
def test_a_step_never_waits_for_the_gpu(changes):
    trainer, optimizer, batch = setting("cuda", **changes)
    step(trainer, optimizer, batch)  # sets up libraries, averages, weights
    torch.cuda.set_sync_debug_mode("error")
    try:
        row = step(trainer, optimizer, trainer.upload(batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert row.isfinite().all()


@pytest.mark.parametrize("first", [True, False])
def test_a_bad_step_changes_no_bit(first):
    trainer, optimizer, batch = setting()
    if not first:
        step(trainer, optimizer, batch)
    weights, state = copy.deepcopy(trainer.student.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    row = step(trainer, optimizer, batch, spoilt=True)
    assert row[:-1].isfinite().all() and row[-1].isnan()
    assert all(torch.equal(x, weights[name]) for name, x in trainer.student.state_dict().items())
    after = optimizer.state_dict()["state"]
    entries = [(i, key, x) for i, of in after.items() for key, x in of.items()]
    assert all(torch.equal(x, state[i][key] if state else torch.zeros_like(x)) for i, key, x in entries)
    step(trainer, optimizer, batch)
    assert all(of["step"] == (1 if first else 2) for of in optimizer.state_dict()["state"].values())
    assert not torch.equal(trainer.student.ffn_norms[0].weight, weights["ffn_norms.0.weight"])


@pytest.mark.parametrize("limit", [1e-2, 1e6])
def test_the_update_is_that_of_clipping_and_adamw_and_reads_its_averages(limit):
    """Averages are those that the form of AdamW which is not fused wrote, as in older checkpoints."""
    trainer, optimizer, batch = setting()
    student, twin = trainer.student, copy.deepcopy(trainer.student)
    groups = script.build_optimizer(twin, trainer.cfg).param_groups
    plain = torch.optim.AdamW([{**group, "fused": False, "lr": 1e-3 * group["lr_multiplier"]} for group in groups])
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        values = trainer.step_gradients(batch, 1)
        for ours, theirs in zip(student.parameters(), twin.parameters()):
            theirs.data.copy_(ours.data)
            theirs.grad = None if ours.grad is None else ours.grad.clone()
        optimizer.load_state_dict({**optimizer.state_dict(), "state": copy.deepcopy(plain.state_dict()["state"])})
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), limit)
        row = script.update(optimizer, values.values(), 1e-3, limit, trainer.processes)
        plain.step()
        torch.testing.assert_close(row, torch.stack([*values.values(), norm]))
        assert (norm > limit) == (limit == 1e-2)
        for ours, theirs in zip(student.parameters(), twin.parameters()):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_repeated_pairs_count_once():
    torch.manual_seed(0)
    student, teacher = torch.randn(30, requires_grad=True), torch.randn(30)
    chosen = script.spread_pairs(teacher, 64)
    assert len(chosen) == 64 and len(chosen.unique()) < 30
    once, counted = chosen.unique_consecutive(), (chosen.diff(prepend=torch.tensor([-1])) != 0).float()
    for loss in (script.spearman_loss, script.pairwise_ranking_loss):
        whole = loss(student[once], teacher[once])
        masked = loss(student[chosen], teacher[chosen], counted=counted)
        torch.testing.assert_close(masked, whole)
        torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (masked, whole)))
    torch.testing.assert_close(script.spearman_loss(teacher, teacher, 1e-5).item(), 0.0, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_whole_training_step_compiles_without_a_break_and_gives_the_same():
    """Student and teacher as one graph each (`fullgraph`), forward and backward, by AOTAutograd, no code made."""
    trainer, _, batch = setting(dropout=0.0, state_dropout=0.0, compile="true")
    found = []
    try:
        for compiled in (False, True):
            if compiled:
                assert script.compile_models(trainer.student, trainer.teacher, trainer.cfg, trainer.device,
                                             backend="aot_eager")
            trainer.student.zero_grad(set_to_none=True)
            values = trainer.step_gradients(batch, 1)
            weights = trainer.student.named_parameters()
            found.append({**values, **{name: p.grad.clone() for name, p in weights if p.grad is not None}})
    finally:
        torch._dynamo.reset()
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-3, atol=1e-5, msg=name)
