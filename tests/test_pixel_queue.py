"""PixelQueue: official outputs, a plain model of the ring, and what must never enter it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, golden, needs_torch, unit
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from pixdistill import PixelQueue
from pixdistill.pixel_queue import unit_vectors


def vectors_of(count, width, seed=0):
    """Random vectors that are not of unit length."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * 5


class PlainRing:
    """The queue as a Python list."""

    def __init__(self, queue):
        self.slots = [row.clone() for row in queue.keys]
        self.next = 0

    def enqueue(self, vectors):
        for vector in vectors:
            self.slots[self.next] = vector / vector.norm()
            self.next = (self.next + 1) % len(self.slots)

    def assert_equals(self, queue):
        assert_close(queue.keys, torch.stack(self.slots), 1e-6)
        assert queue.ptr == self.next


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pooled_update_equals_official_outputs(name, dtype):
    official = golden(f"pcd_pixel_contrast_{name}")
    queue = PixelQueue(official["queue"].shape[1], official["queue"].shape[0], dtype=dtype)
    queue.keys.copy_(official["queue"].T)
    queue.enqueue_pooled(official["teacher1"].to(dtype))
    assert_close(queue.keys, official["queue_after"].T, 1e-6)
    assert queue.ptr == official["queue_ptr_after"]
    assert_close(queue.keys[: int(queue.ptr)], official["pooled_key"], 1e-6)


# --- The start ------------------------------------------------------------------------------------


def test_starts_as_different_random_unit_vectors():
    queue = PixelQueue(400, 16)
    assert_close(queue.keys.norm(dim=1), torch.ones(400), 1e-6)
    assert queue.keys.mean(dim=0).abs().max() < 0.1  # no direction preferred: deviation 0.0125
    similarities = (queue.keys @ queue.keys.T).fill_diagonal_(0.0)
    assert similarities.abs().max() < 0.99
    assert queue.ptr == 0


def test_start_follows_the_global_generator():
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        starts.append(PixelQueue(6, 4).keys)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_buffers_have_names_shapes_and_dtypes(dtype):
    queue = PixelQueue(5, 3, dtype=dtype)
    keys, ptr = queue.keys, queue.ptr
    assert [name for name, _ in queue.named_buffers()] == ["keys", "ptr"]
    assert set(queue.state_dict()) == {"keys", "ptr"}
    assert list(queue.parameters()) == []
    assert keys.shape == (5, 3)
    assert keys.dtype == (dtype or torch.get_default_dtype())
    assert ptr.shape == ()
    assert ptr.dtype == torch.int64
    assert (queue.size, queue.dim) == (5, 3)
    assert_close(keys.double().norm(dim=1), torch.ones(5), 2e-2)
    queue.enqueue(vectors_of(2, 3))
    assert queue.keys.dtype == keys.dtype
    assert_close(queue.keys[:2], F.normalize(vectors_of(2, 3)), 1e-2)


def test_conversion_keeps_the_pointer_an_integer():
    queue = PixelQueue(5, 3)
    queue.enqueue(vectors_of(2, 3))
    queue.half()
    assert queue.keys.dtype == torch.float16
    assert queue.ptr.dtype == torch.int64
    queue.enqueue(vectors_of(1, 3))
    assert queue.ptr == 3


def test_device_argument_and_reset_parameters():
    queue = PixelQueue(5, 3, device="meta")
    assert queue.keys.is_meta
    assert queue.ptr.is_meta
    queue.to_empty(device="cpu").reset_parameters()
    assert_close(queue.keys.norm(dim=1), torch.ones(5), 1e-6)
    assert queue.ptr == 0
    before = queue.keys.clone()
    queue.enqueue(vectors_of(2, 3))
    queue.reset_parameters()
    assert queue.ptr == 0
    assert (queue.keys != before).any(dim=1).all()


def test_repr_shows_size_and_width():
    assert repr(PixelQueue(5, 3)) == "PixelQueue(size=5, dim=3)"


# --- The ring -------------------------------------------------------------------------------------


@given(
    size=st.integers(1, 9),
    counts=st.lists(st.integers(0, 25), min_size=1, max_size=12),
    seed=st.integers(0, 999),
)
def test_equals_a_plain_ring_under_any_sequence(size, counts, seed):
    queue = PixelQueue(size, 3)
    ring = PlainRing(queue)
    for step, count in enumerate(counts):
        vectors = vectors_of(count, 3, seed=seed + step)
        queue.enqueue(vectors)
        ring.enqueue(vectors)
        ring.assert_equals(queue)


def test_writes_over_the_oldest_and_wraps():
    queue = PixelQueue(5, 3)
    start, fresh = queue.keys.clone(), F.normalize(vectors_of(9, 3))
    queue.enqueue(fresh[:3])
    assert_close(queue.keys, torch.cat([fresh[:3], start[3:]]), 1e-6)
    assert queue.ptr == 3
    queue.enqueue(fresh[3:7])
    assert_close(queue.keys, fresh[[5, 6, 2, 3, 4]], 1e-6)
    assert queue.ptr == 2


@pytest.mark.parametrize("count", [5, 6, 10, 13])
@pytest.mark.parametrize("before", [0, 3])
def test_a_batch_above_the_size_keeps_the_newest(count, before):
    queue = PixelQueue(5, 3)
    queue.enqueue(vectors_of(before, 3, seed=1))
    vectors = vectors_of(count, 3, seed=2)
    queue.enqueue(vectors)
    newest = {tuple(row.tolist()) for row in F.normalize(vectors[-5:]).round(decimals=4)}
    assert {tuple(row.tolist()) for row in queue.keys.round(decimals=4)} == newest
    assert queue.ptr == (before + count) % 5
    oldest = queue.keys[int(queue.ptr)]
    assert_close(oldest, F.normalize(vectors[-5:])[0], 1e-6)


def test_an_empty_batch_changes_nothing():
    queue = PixelQueue(5, 3)
    queue.enqueue(vectors_of(2, 3))
    before = queue.keys.clone()
    queue.enqueue(torch.empty(0, 3))
    queue.enqueue_pooled(torch.empty(0, 3, 4, 4))
    assert torch.equal(queue.keys, before)
    assert queue.ptr == 2


def test_vectors_are_normalised():
    queue = PixelQueue(4, 3)
    vectors = vectors_of(4, 3) * torch.tensor([1e-9, 1.0, 1e6, 1e15]).unsqueeze(1)
    queue.enqueue(vectors)
    assert_close(queue.keys, F.normalize(vectors.double()), 1e-6)


def test_half_precision_vectors_are_normalised_without_overflow():
    queue = PixelQueue(2, 64)
    sizes = torch.tensor([[9e4], [3e-4]])  # the norm, and its square, leave float16
    vectors = (unit(2, 64) * sizes).half()
    assert vectors.isfinite().all()
    queue.enqueue(vectors)
    assert_close(queue.keys, F.normalize(vectors.double()), 1e-3)


def test_a_vector_whose_squares_overflow_is_not_finite():
    assert unit_vectors(torch.full((1, 3), 3e19)).isnan().all()


def test_buffers_stay_the_same_storage():
    queue = PixelQueue(5, 3)
    keys, ptr = queue.keys, queue.ptr
    queue.enqueue(vectors_of(7, 3))
    queue.reset_parameters()
    assert queue.keys is keys
    assert queue.ptr is ptr


def test_vectors_are_left_as_they_were():
    queue, vectors = PixelQueue(5, 3), vectors_of(7, 3)
    before = vectors.clone()
    queue.enqueue(vectors)
    queue.enqueue(vectors.T.contiguous().T)
    assert torch.equal(vectors, before)


def test_strided_vectors_equal_contiguous_ones():
    vectors = vectors_of(4, 3)
    strided = torch.stack([vectors, -vectors], dim=2).flatten(1)[:, ::2]
    for form in (strided, vectors.T.contiguous().T):
        queue = PixelQueue(5, 3)
        assert not form.is_contiguous()
        queue.enqueue(form)
        assert_close(queue.keys[:4], F.normalize(vectors), 1e-6)


# --- What must not enter --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_that_are_not_finite_leave_their_slots(value, everywhere, dtype):
    queue = PixelQueue(5, 3)
    queue.enqueue(vectors_of(3, 3))
    before = queue.keys.clone()
    vectors = vectors_of(4, 3, seed=1).to(dtype)
    vectors[1, slice(None) if everywhere else 2] = value
    vectors[3, slice(None) if everywhere else 0] = value
    queue.enqueue(vectors)
    good = F.normalize(vectors.double())
    expected = before.double()
    expected[3], expected[0] = good[0], good[2]
    assert queue.keys.isfinite().all()
    assert_close(queue.keys, expected, 1e-3 if dtype == torch.float16 else 1e-6)
    assert torch.equal(queue.keys[[1, 2, 4]], before[[1, 2, 4]])
    assert queue.ptr == 2


@pytest.mark.parametrize("length", [0.0, 1e-13])
def test_rows_without_direction_leave_their_slots(length):
    queue = PixelQueue(5, 3)
    before = queue.keys.clone()
    vectors = vectors_of(3, 3)
    vectors[1] = torch.tensor([length, 0.0, 0.0])
    queue.enqueue(vectors)
    expected = before.clone()
    expected[0], expected[2] = F.normalize(vectors)[0], F.normalize(vectors)[2]
    assert_close(queue.keys, expected, 1e-6)
    assert torch.equal(queue.keys[1], before[1])
    assert queue.ptr == 3


def test_a_unit_vector_with_zero_entries_enters():
    queue = PixelQueue(5, 3)
    queue.enqueue(torch.eye(3) * -2)
    assert torch.equal(queue.keys[:3], -torch.eye(3))


def test_a_batch_without_any_usable_row_moves_only_the_pointer():
    queue = PixelQueue(5, 3)
    before = queue.keys.clone()
    queue.enqueue(torch.full((13, 3), torch.nan))
    queue.enqueue_pooled(torch.zeros(2, 3, 4, 4))
    assert torch.equal(queue.keys, before)
    assert queue.ptr == 0


def test_a_map_that_is_not_finite_leaves_the_slot_of_its_image():
    queue = PixelQueue(5, 3)
    before = queue.keys.clone()
    teacher = vectors_of(2, 3 * 4, seed=3).view(2, 3, 2, 2)
    teacher[0, 1, 0, 1] = torch.inf
    queue.enqueue_pooled(teacher)
    assert torch.equal(queue.keys[0], before[0])
    assert_close(queue.keys[1], F.normalize(teacher[1].mean(dim=(1, 2)), dim=0), 1e-6)
    assert queue.ptr == 2


@pytest.mark.parametrize("pooled", [False, True])
def test_no_gradient_is_recorded(pooled):
    queue = PixelQueue(5, 3)
    source = vectors_of(2, 3).requires_grad_()
    if pooled:
        queue.enqueue_pooled((source * 2).unsqueeze(-1))
    else:
        queue.enqueue(source * 2)
    assert not queue.keys.requires_grad
    assert queue.keys.grad_fn is None
    assert queue.keys.is_leaf
    assert_close(queue.keys[:2], F.normalize(source), 1e-6)


# --- Pooled maps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [(7,), (1, 1), (3, 5), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("size", [2, 5, 16])
def test_pooled_is_average_then_normalise(spatial, size):
    teacher = vectors_of(3, 4 * 15)[:, : 4 * torch.Size(spatial).numel()].reshape(3, 4, *spatial)
    queue = PixelQueue(size, 4)
    ring = PlainRing(queue)
    averages = [[teacher[b, c].sum() / teacher[b, c].numel() for c in range(4)] for b in range(3)]
    queue.enqueue_pooled(teacher)
    ring.enqueue(torch.tensor(averages))
    ring.assert_equals(queue)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_maps_are_averaged_in_float32(dtype):
    teacher = (vectors_of(2, 3 * 64).view(2, 3, 8, 8) + 40_000).to(dtype)  # the sum leaves float16
    teacher[:, 1] = 7
    queue = PixelQueue(5, 3)
    queue.enqueue_pooled(teacher)
    exact = F.normalize(teacher.double().mean(dim=(2, 3)))
    assert_close(queue.keys[:2], exact, 1e-6)


def test_pooled_takes_channels_last_maps():
    teacher = vectors_of(2, 3 * 20).view(2, 3, 4, 5)
    one, two = PixelQueue(5, 3), PixelQueue(5, 3)
    two.load_state_dict(one.state_dict())
    one.enqueue_pooled(teacher)
    two.enqueue_pooled(teacher.contiguous(memory_format=torch.channels_last))
    assert_close(one.keys, two.keys, 1e-6)


# --- State ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "resume",
    [
        copy.deepcopy,
        lambda queue: pickle.loads(pickle.dumps(queue)),
        lambda queue: (fresh := PixelQueue(5, 3)).load_state_dict(queue.state_dict()) and fresh,
    ],
    ids=["deepcopy", "pickle", "state_dict"],
)
def test_resuming_in_the_middle_continues_exactly(resume):
    queue = PixelQueue(5, 3)
    queue.enqueue(vectors_of(3, 3, seed=1))
    other = resume(queue)
    assert other.keys.data_ptr() != queue.keys.data_ptr()
    for seed in (2, 3):
        queue.enqueue(vectors_of(4, 3, seed=seed))
        assert not torch.equal(other.keys, queue.keys)
        other.enqueue(vectors_of(4, 3, seed=seed))
        assert torch.equal(other.keys, queue.keys)
        assert other.ptr == queue.ptr == (3 + 4 * (seed - 1)) % 5


@pytest.mark.parametrize("key", ["keys", "ptr"])
def test_loading_names_a_missing_key(key):
    queue = PixelQueue(5, 3)
    state = queue.state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        queue.load_state_dict(state)


def test_loading_refuses_another_size():
    with pytest.raises(RuntimeError, match="size mismatch for keys"):
        PixelQueue(5, 3).load_state_dict(PixelQueue(6, 3).state_dict())


def test_same_bits_twice_under_deterministic_algorithms():
    start = PixelQueue(5, 3)
    one, two = copy.deepcopy(start), copy.deepcopy(start)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for queue in (one, two):
            queue.enqueue(vectors_of(7, 3))
    finally:
        torch.use_deterministic_algorithms(before)
    assert torch.equal(one.keys, two.keys)
    start.enqueue(vectors_of(7, 3))
    assert torch.equal(one.keys, start.keys)


@needs_torch("2.7", "compiles again for a new size")
@pytest.mark.parametrize("pooled", [False, True])
def test_compiles_once_for_all_batch_sizes(pooled):
    eager = PixelQueue(7, 3)
    queue = copy.deepcopy(eager)
    name = "enqueue_pooled" if pooled else "enqueue"
    torch._dynamo.reset()
    try:
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(
            getattr(queue, name), fullgraph=True, dynamic=True, backend=counter
        )
        frames = []
        for step, count in enumerate((2, 3, 5, 9, 11, 4)):
            vectors = vectors_of(count, 3, seed=step)
            vectors[1] = torch.nan
            batch = vectors.view(count, 3, 1, 1).expand(-1, -1, 2, 2 + step) if pooled else vectors
            compiled(batch)
            getattr(eager, name)(batch)
            assert_close(queue.keys, eager.keys, 1e-6)
            assert queue.ptr == eager.ptr
            frames.append(counter.frame_count)
    finally:
        torch._dynamo.reset()
    assert frames[1:] == [frames[1]] * 5


# --- Labels ---------------------------------------------------------------------------------------


def unlike(label):
    """A vector that tells its label, 0 to 2."""
    return torch.eye(3)[label] * 5


@given(st.lists(st.lists(st.integers(-1, 2), max_size=9), max_size=6))
def test_labels_stay_with_their_vectors(batches):
    """Whatever wraps or is too long; -1 stands for a vector that is skipped, with its label."""
    queue = PixelQueue(5, 3, labels=True)
    assert (queue.key_labels == -1).all()
    for labels in batches:
        vectors = [unlike(label) if label >= 0 else torch.full((3,), torch.nan) for label in labels]
        vectors = torch.stack([*vectors, unlike(0)])
        queue.enqueue(vectors, labels=torch.tensor([*(7 if x < 0 else x for x in labels), 0]))
    known = queue.key_labels >= 0
    assert known.sum() <= sum(sum(x >= 0 for x in labels) + 1 for labels in batches)
    assert bool(batches) == bool(known.any())
    assert torch.equal(queue.keys[known], torch.eye(3)[queue.key_labels[known].long()])


def test_labels_are_saved_resumed_and_reset():
    queue = PixelQueue(5, 3, labels=True)
    assert set(queue.state_dict()) == {"keys", "ptr", "key_labels"}
    assert repr(queue) == "PixelQueue(size=5, dim=3, labels=True)"
    queue.enqueue_pooled(vectors_of(3, 12).view(3, 3, 4), labels=torch.tensor([4, -1, 2]))
    assert queue.key_labels.tolist() == [4, -1, 2, -1, -1]
    assert queue.half().key_labels.dtype == torch.int32
    other = PixelQueue(5, 3, labels=True)
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.enqueue(vectors_of(4, 3), labels=torch.tensor([5, 6, 7, 8], dtype=torch.uint8))
        assert each.key_labels.tolist() == [7, 8, 2, 5, 6]
    queue.reset_parameters()
    assert (queue.key_labels == -1).all()
    with pytest.raises(RuntimeError, match=r'Missing key.*"key_labels"'):
        queue.load_state_dict(PixelQueue(5, 3).state_dict())
    meta = PixelQueue(5, 3, labels=True, device="meta")
    assert (meta.to_empty(device="cpu").reset_parameters() or meta.key_labels == -1).all()


@pytest.mark.parametrize(
    ("error", "words", "queue_labels", "labels"),
    [
        (ValueError, r"keeps them; got None. .*torch.full\(\(n,\), -1\)", True, None),
        (ValueError, "queue without; got some. Build it with labels=True", False, torch.zeros(2).int()),
        (ValueError, r"labels must have .*shape \(2,\); got \(3,\)", True, torch.zeros(3).int()),
        (TypeError, "labels must be integers; got torch.float32", True, torch.zeros(2)),
    ],
)  # fmt: skip
def test_wrong_labels(error, words, queue_labels, labels):
    queue = PixelQueue(5, 3, labels=queue_labels)
    with pytest.raises(error, match=words):
        queue.enqueue(vectors_of(2, 3), labels=labels)


# --- Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["size", "dim"])
@pytest.mark.parametrize(
    ("error", "words", "value"),
    [
        (ValueError, "must be at least 1; got 0", 0),
        (ValueError, "must be at least 1; got -3", -3),
        (TypeError, "must be an int; got 4.0", 4.0),
        (TypeError, "must be an int; got '4'", "4"),
        (TypeError, "must be an int; got True", True),
        (TypeError, "must be an int; got None", None),
    ],
)
def test_wrong_sizes(name, error, words, value):
    with pytest.raises(error, match=f"{name} {words}"):
        PixelQueue(**{"size": 5, "dim": 3, name: value})


@pytest.mark.parametrize(
    ("error", "words", "vectors"),
    [
        (ValueError, r"vectors must have shape \[n, 3\]; got \(2, 4\)", torch.ones(2, 4)),
        (ValueError, r"vectors must have shape \[n, 3\]; got \(3,\)", torch.ones(3)),
        (ValueError, r"vectors must have shape \[n, 3\]; got \(1, 2, 3\)", torch.ones(1, 2, 3)),
        (TypeError, "vectors must be a tensor; got list", [[1.0, 2.0, 3.0]]),
        (TypeError, "vectors must be float16.*got torch.int64", torch.ones(2, 3).long()),
        (ValueError, "queue's device, cpu; got meta", torch.ones(2, 3, device="meta")),
    ],
)  # fmt: skip
def test_wrong_vectors_leave_the_queue_as_it_was(error, words, vectors):
    queue = PixelQueue(5, 3)
    before = queue.keys.clone()
    with pytest.raises(error, match=words):
        queue.enqueue(vectors)
    assert torch.equal(queue.keys, before)
    assert queue.ptr == 0


@pytest.mark.parametrize(
    ("error", "words", "teacher"),
    [
        (ValueError, r"teacher_map must have shape \[B, 3, .*; got \(2, 3\)", torch.ones(2, 3)),
        (TypeError, "teacher_map must be a tensor; got list", [1.0]),
        (TypeError, "teacher_map must be float16.*got torch.int64", torch.ones(2, 3, 5, 5).long()),
        (ValueError, r"got \(2, 4", torch.ones(2, 4, 5, 5)),
    ],
)  # fmt: skip
def test_wrong_maps_leave_the_queue_as_it_was(error, words, teacher):
    queue = PixelQueue(5, 3)
    before = queue.keys.clone()
    with pytest.raises(error, match=words):
        queue.enqueue_pooled(teacher)
    assert torch.equal(queue.keys, before)
    assert queue.ptr == 0
