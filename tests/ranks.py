"""What tests/test_distributed.py runs on each of its ranks, in a process of its own."""

from __future__ import annotations

from typing import Any

import global_batch
import pytest
import torch
import torch.distributed as dist

from kdkernels import Queue, compress_loss, distillation_loss, kl_div, linear_distillation_loss
from kdkernels.distributed import count_items, shards, vocab_parallel_linear_loss, vocab_parallel_loss

RANKS = 4
N, V, H = 7, 24, 5
CHECKS: list[Any] = []


def check(function: Any) -> Any:
    CHECKS.append(function)
    return function


def run(rank: int, folder: str) -> None:
    """All checks, among all ranks and in pairs. An error here ends the other ranks too."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for function in (*CHECKS, *global_batch.CHECKS):
        for group in (dist.group.WORLD, pairs[rank // 2]):
            torch.manual_seed(3)
            function(group)
    dist.destroy_process_group()


def shard(x: torch.Tensor, group: Any, axis: int = -1) -> torch.Tensor:
    return (
        x.detach().chunk(dist.get_world_size(group), axis)[dist.get_rank(group)].clone().requires_grad_(x.requires_grad)
    )


def close(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-6)


def scores(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    s, t = (3 * torch.randn(N, V, dtype=dtype).requires_grad_() for _ in range(2))
    labels = torch.randint(0, V, (N,))
    labels[2] = -100
    return s.detach().requires_grad_(), t.detach().requires_grad_(), labels


VARIANTS: tuple[tuple[str, dict[str, float], float], ...] = (
    ("forward_kl", {}, 1.0),
    ("forward_kl", {}, 0.4),
    ("reverse_kl", {}, 0.7),
    ("js", {"beta": 0.3}, 1.0),
    ("js", {"beta": 1.0}, 1.0),
    ("total_variation", {}, 0.5),
)


@check
def logits_as_in_one_process(group: Any) -> None:
    for divergence, options, alpha in VARIANTS:
        for reduction in ("rowmean", "none"):
            for teacher_learns in (False, True):
                s, t, labels = scores()
                arguments = {"divergence": divergence, "divergence_options": options, "reduction": reduction}
                expected = distillation_loss(s, t, labels, 2.0, alpha, **arguments)
                wanted = torch.autograd.grad(
                    expected, (s, t), torch.linspace(0.5, 2, N) if reduction == "none" else None
                )
                mine = shard(s, group), shard(t, group).requires_grad_(teacher_learns)
                loss = vocab_parallel_loss(*mine, labels, 2.0, alpha, **arguments, group=group, chunk_bytes=300)
                close(loss, expected)
                upstream = torch.linspace(0.5, 2, N) if reduction == "none" else None
                got = torch.autograd.grad(loss, mine[: 1 + teacher_learns], upstream)
                close(got, tuple(shard(w, group) for w in wanted[: 1 + teacher_learns]))


@check
def float64_and_float16(group: Any) -> None:
    s, t, labels = scores(torch.float64)
    expected = kl_div(s, t, labels=labels)
    mine = shard(s, group), shard(t, group)
    loss = vocab_parallel_loss(*mine, labels, group=group)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, mine[0])[0], shard(torch.autograd.grad(expected, s)[0], group))
    half = [x.detach().half().requires_grad_() for x in mine]
    scaled = 65536 * vocab_parallel_loss(*half, labels, num_items=1e6, group=group)
    gradient = torch.autograd.grad(scaled, half[0])[0]
    wanted = torch.autograd.grad(65536 * kl_div(s, t, labels=labels, num_items=1e6), s)[0]
    torch.testing.assert_close(gradient.double(), shard(wanted, group), rtol=2e-2, atol=1e-6)


@check
def masked_classes_of_a_whole_shard(group: Any) -> None:
    """The last rank has nothing but padding."""
    s, t, _ = scores()
    keep = torch.arange(V) < V // dist.get_world_size(group)
    s, t = (x.detach().masked_fill(~keep, float("-inf")).requires_grad_() for x in (s, t))
    for divergence in ("forward_kl", "reverse_kl", "js"):
        expected = distillation_loss(s, t, torch.zeros(N).long(), 1.0, 1.0, divergence=divergence)
        mine = shard(s, group), shard(t.detach(), group)
        loss = vocab_parallel_loss(*mine, divergence=divergence, group=group)
        close(loss, expected)
        close(
            torch.autograd.grad(loss, mine[0])[0], shard(torch.autograd.grad(expected, s, retain_graph=True)[0], group)
        )


@check
def heads_as_in_one_process(group: Any) -> None:
    for divergence, options, alpha in VARIANTS[1:4]:
        hidden = [torch.randn(2, 4, h).requires_grad_() for h in (H, H + 1)]
        weights = [torch.randn(V, h).requires_grad_() for h in (H, H + 1)]
        bias = torch.randn(V).requires_grad_()
        labels = torch.randint(0, V, (2, 4))
        labels[1, 1] = -100
        options = {
            "divergence": divergence, "divergence_options": options, "student_softcap": 4.0, "student_logit_scale": 0.8,
            "teacher_logit_scale": 1.2,
        }  # fmt: skip
        expected = linear_distillation_loss(
            hidden[0], weights[0], hidden[1], weights[1], labels, 1.5, alpha, student_bias=bias, **options
        )
        wanted = torch.autograd.grad(expected, (hidden[0], weights[0], bias, hidden[1], weights[1]))
        mine = [shard(w, group, 0) for w in (*weights, bias)]
        loss = vocab_parallel_linear_loss(
            hidden[0], mine[0], hidden[1], mine[1], labels, 1.5, alpha, student_bias=mine[2], group=group,
            chunk_bytes=300, **options,
        )  # fmt: skip
        close(loss, expected)
        got = torch.autograd.grad(loss, (hidden[0], mine[0], mine[2], hidden[1], mine[1]))
        whole = (
            wanted[0],
            shard(wanted[1], group, 0),
            shard(wanted[2], group, 0),
            wanted[3],
            shard(wanted[4], group, 0),
        )
        close(got, whole)


@check
def a_rank_without_classes(group: Any) -> None:
    """The last one's shard is empty: it takes part, and its hidden states' gradient is whole."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    s, t, labels = scores()
    parts = [x.detach().chunk(ranks - 1, -1)[rank] if rank < ranks - 1 else x.detach()[:, V:] for x in (s, t)]
    hidden, head = torch.randn(N, H).requires_grad_(), torch.randn(V, H)
    mine = head.chunk(ranks - 1)[rank] if rank < ranks - 1 else head[V:]
    for divergence in ("forward_kl", "reverse_kl", "js"):
        for reduction in ("rowmean", "none"):
            options = {"divergence": divergence, "reduction": reduction}
            local = [x.clone().requires_grad_() for x in parts]
            loss = vocab_parallel_loss(*local, labels, 1.0, 0.6, **options, group=group)
            expected = distillation_loss(s, t, labels, 1.0, 0.6, **options)
            close(loss, expected)
            got, whole = torch.autograd.grad(loss.sum(), local), torch.autograd.grad(expected.sum(), (s, t))
            start = rank * parts[0].shape[1] if rank < ranks - 1 else V
            close(got, tuple(w[:, start : start + parts[0].shape[1]] for w in whole))
        for dtype in (torch.float32, torch.bfloat16):
            x, weights = (
                hidden.detach().to(dtype).requires_grad_(),
                [w.to(dtype).requires_grad_() for w in (mine, mine.flip(1))],
            )
            loss = vocab_parallel_linear_loss(x, weights[0], x.detach(), weights[1], divergence=divergence, group=group)
            wide = x.detach().float().requires_grad_()
            all_weights = [w.to(dtype).float() for w in (head, head.flip(1))]
            expected = linear_distillation_loss(
                wide,
                all_weights[0],
                wide.detach(),
                all_weights[1],
                labels.clamp(min=0),
                1.0,
                1.0,
                divergence=divergence,
            )
            close(loss, expected)
            got, wanted = torch.autograd.grad(loss, (x, *weights)), torch.autograd.grad(expected, wide)[0]
            torch.testing.assert_close(
                got[0].float(), wanted, rtol=2**-7 if dtype != torch.float32 else 2e-5, atol=1e-6
            )
            assert got[1].shape == mine.shape


@check
def dtensors_know_their_shards(group: Any) -> None:
    if group is not dist.group.WORLD:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    s, t, labels = scores()
    expected = distillation_loss(s, t, labels, 1.0, 0.5)
    uneven = [x.detach() for x in (s, t)]
    local = [distribute_tensor(x, mesh, [Shard(1)]).requires_grad_() for x in uneven]
    loss = vocab_parallel_loss(*local, labels, 1.0, 0.5)
    close(loss, expected)
    loss.backward()
    close(local[0].grad.full_tensor(), torch.autograd.grad(expected, s)[0])
    hidden, head = torch.randn(N, H).requires_grad_(), torch.randn(V - 1, H).requires_grad_()
    expected = linear_distillation_loss(
        hidden, head, hidden.detach(), head.detach().flip(0), labels % (V - 1), 1.0, 1.0
    )
    heads = [distribute_tensor(x, mesh, [Shard(0)]) for x in (head.detach(), head.detach().flip(0))]
    replicated = distribute_tensor(hidden.detach(), mesh, [Replicate()]).requires_grad_()
    heads[0].requires_grad_()
    loss = vocab_parallel_linear_loss(replicated, heads[0], hidden.detach(), heads[1])
    close(loss, expected)
    loss.backward()
    wanted = torch.autograd.grad(expected, (hidden, head))
    close((replicated.grad.full_tensor(), heads[0].grad.full_tensor()), wanted)


@check
def tokens_spread_over_ranks(group: Any) -> None:
    """Unequal shares of the ignored: the ranks' losses add up to the mean over all tokens."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    s, t = torch.randn(8, V).requires_grad_(), torch.randn(8, V)
    labels = torch.randint(0, V, (8,))
    labels[:3] = -100
    expected = kl_div(s, t, labels=labels)
    wanted = torch.autograd.grad(expected, s)[0]
    part = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    mine = shard(s, group, 0)
    loss = kl_div(mine, t[part], labels=labels[part], num_items=count_items(labels[part], group=group))
    close(torch.autograd.grad(loss, mine)[0], wanted[part])
    total = loss.detach().clone()
    dist.all_reduce(total, group=group)
    close(total, expected.detach())
    averaged = count_items((labels[part] != -100).float(), weighted=True, average=True, group=group)
    close(averaged, torch.tensor(5.0 / ranks))


@check
def queues_agree_on_all_ranks(group: Any) -> None:
    queue = Queue(16, 3, generator=torch.Generator().manual_seed(0))
    batch = torch.randn(RANKS, 2, 3)[dist.get_rank(group)]
    queue.enqueue(batch, group=group)
    size = 2 * dist.get_world_size(group)
    assert queue.position == size
    at = 2 * dist.get_rank(group)
    close(queue.entries[at : at + 2], torch.nn.functional.normalize(batch, dim=1))


@check
def queues_inside_data_parallel_models(group: Any) -> None:
    """DDP broadcasts rank 0's buffers before each forward: a queue filled from all ranks is the same already, and a loss that
    read it goes backward after the enqueue."""

    class Student(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 3)
            self.queue = Queue(8, 3, generator=torch.Generator().manual_seed(0))

        def forward(self, x: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            loss = compress_loss(self.net(x), teacher, self.queue.entries)
            self.queue.enqueue(teacher, group=group)
            return loss

    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    student, batches = Student(), torch.randn(3, 2 * ranks, 7)
    alone = torch.nn.Linear(4, 3)
    alone.load_state_dict(student.net.state_dict())
    whole = Queue(8, 3, generator=torch.Generator().manual_seed(0))
    parallel = torch.nn.parallel.DistributedDataParallel(student, process_group=group)
    for batch in batches:
        mine = batch[2 * rank : 2 * rank + 2]
        parallel.zero_grad()
        parallel(mine[:, :4], mine[:, 4:]).backward()
        alone.zero_grad()
        compress_loss(alone(batch[:, :4]), batch[:, 4:], whole.entries).backward()
        whole.enqueue(batch[:, 4:])
        close([p.grad for p in student.net.parameters()], [p.grad for p in alone.parameters()])
        assert torch.equal(student.queue.entries, whole.entries)
        assert student.queue.position == whole.position


@check
def bad_input(group: Any) -> None:
    for arguments, words in (
        ({"divergence": "decoupled_kl"}, "not available over a sharded vocabulary"),
        ({"alpha": 0.5}, "labels must be a tensor where alpha is below 1"),
        ({"labels": torch.full((N,), V)}, f"outside 0 to {V - 1}"),
    ):
        s, t, _ = scores()
        given = {"student_logits": shard(s, group), "teacher_logits": shard(t, group), **arguments}
        with pytest.raises((ValueError, TypeError, IndexError), match=words):
            vocab_parallel_loss(**given, group=group)


@check
def one_collective_a_chunk_for_the_kl_kinds(group: Any) -> None:
    """And two for the others; one more in all for the loss, and one for the hidden states' gradient."""
    real = dist.all_reduce, shards.all_gather
    calls: list[str] = []
    dist.all_reduce = lambda *a, **k: (calls.append("reduce"), real[0](*a, **k))[1]
    shards.all_gather = lambda *a, **k: (calls.append("gather"), real[1](*a, **k))[1]
    try:
        hidden, head = torch.randn(8, H).requires_grad_(), torch.randn(6, H).requires_grad_()
        for divergence, each in (("forward_kl", 0), ("reverse_kl", 0), ("js", 1)):
            calls.clear()
            loss = vocab_parallel_linear_loss(
                hidden,
                head,
                hidden.detach(),
                head.detach(),
                divergence=divergence,
                group=group,
                chunk_bytes=4 * 4 * 6 * 4,
            )
            loss.backward()
            assert calls.count("gather") == 2
            assert calls.count("reduce") == 2 * each + 2
    finally:
        dist.all_reduce, shards.all_gather = real
