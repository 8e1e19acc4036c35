"""Labels in the contrast: a loop over classes in float64, the properties of labels, and errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, LargestTensor, assert_close, device_of, float32_tolerance, launches
from helpers import high_precision as high_precision

from pixdistill import PixelContrastLoss, PixelQueue, pixel_contrast_loss
from pixdistill.ops.row_lse import chunked

WIDTH, TEMPERATURE = 6, 0.3
NEGATIVES = ("batch", "image", "queue", "batch+queue", "image+queue")
backends = pytest.mark.parametrize("backend", BACKENDS)
all_negatives = pytest.mark.parametrize("negatives", NEGATIVES)


def problem(*sizes, seed=0):
    """Maps `[B, WIDTH, *spatial]`, and labels, some of them negative, and a mask `[B, *spatial]`."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, sizes[0], WIDTH, *sizes[1:], generator=generator, dtype=torch.float64)
    labels = torch.randint(-2, 3, sizes, generator=generator)
    valid = torch.rand(sizes, generator=generator) > 0.25
    return maps[0], maps[1] + 0.4 * maps[0], labels, valid


def queue_of(labels=(-1, 0, -2, 1, 2, 0, 1), dtype=torch.float64):
    """A queue with these labels and, in its last two slots, none."""
    torch.manual_seed(5)
    queue = PixelQueue(len(labels) + 2, WIDTH, labels=True, dtype=dtype)
    queue.enqueue(torch.randn(len(labels), WIDTH), labels=torch.tensor(labels))
    queue.keys.copy_(F.normalize(queue.keys))  # the start is normalised in float32
    return queue


def build(backend, negatives, queue=None, dtype=torch.float64, **settings):
    """The loss, and a queue where negatives name one. float64 becomes what the backend takes."""
    own = negatives.removesuffix("queue").removesuffix("+") or None
    queue = (queue or queue_of()) if "queue" in negatives else None
    loss = PixelContrastLoss(TEMPERATURE, negatives=own, queue=queue, backend=backend, **settings)
    return loss.to(device_of(backend), torch.float32 if backend == "triton" else dtype)


def tolerance(backend):
    return float32_tolerance(backend) if backend == "triton" else 1e-12


def rows_of(image):
    return image.flatten(2).mT.flatten(0, 1)


def loop_over_classes(student, teacher, labels, valid, negatives, queue, temperature):
    """Loss and largest rival minus positive of each pixel, by selection of whole classes."""
    image_of = torch.arange(len(student)).repeat_interleave(student[0, 0].numel())
    student, teacher = (F.normalize(rows_of(x), dim=1) for x in (student, teacher))
    labels, valid = labels.flatten(), valid.flatten()
    positive = (student * teacher).sum(dim=1) / temperature
    losses, lead = torch.zeros_like(positive), torch.full_like(positive, -torch.inf)
    groups = image_of.unique() if "image" in negatives else [None]
    for image, label in itertools.product(groups, labels.unique()):
        inside = torch.ones_like(valid) if image is None else image_of == image
        anchors = (inside & valid & (labels == label)).nonzero().flatten()
        others = inside & valid & ((labels != label) | (label < 0)) & (negatives != "queue")
        keys, column = [teacher[others]], others.nonzero().flatten()
        if queue is not None:
            seen = (queue.key_labels != label) | (label < 0)
            keys.append(queue.keys[seen].double())
        logits = student[anchors] @ torch.cat(keys).T / temperature
        own = F.pad(anchors.unsqueeze(1) == column, (0, logits.shape[1] - len(column)))
        logits = logits.masked_fill(own, -torch.inf)
        all_logits = torch.cat([positive[anchors].unsqueeze(1), logits], dim=1)
        losses = losses.index_copy(0, anchors, all_logits.logsumexp(1) - positive[anchors])
        lead[anchors] = (
            F.pad(logits, (0, 1), value=-torch.inf).amax(1) - positive[anchors]
        ).detach()
    return losses, lead


# --- A loop over classes --------------------------------------------------------------------------


@backends
@all_negatives
@pytest.mark.parametrize("sizes", [(2, 3, 5), (3, 7), (1, 2, 2, 3)], ids=str)
def test_equals_a_loop_over_classes(backend, negatives, sizes, monkeypatch):
    """Loss, components, and gradients of the map and of a learned temperature, with a mask."""
    monkeypatch.setattr(chunked, "_CPU_BLOCK", (7, 4))
    student, teacher, labels, valid = problem(*sizes)
    loss = build(backend, negatives, reduction="none", learnable_temperature=True)
    leaf = student.clone().requires_grad_()
    log_temperature = loss.log_temperature.detach().cpu().double().requires_grad_()
    queue = None if loss.queue is None else queue_of()
    truth, lead = loop_over_classes(
        leaf, teacher, labels, valid, negatives, queue, log_temperature.exp()
    )
    weights = torch.linspace(1.0, 2.0, truth.numel(), dtype=torch.float64)
    expected = torch.autograd.grad((truth * weights).sum(), (leaf, log_temperature))

    like = next(loss.parameters())
    student, teacher = (x.to(like) for x in (student, teacher))
    options = {"labels": labels.to(like.device), "valid_mask": valid.to(like.device)}
    parts = loss(student.requires_grad_(), teacher, **options, return_components=True)
    total = (parts.loss.flatten() * weights.to(like)).sum()
    grads = torch.autograd.grad(total, (student, loss.log_temperature))
    assert_close(parts.loss.flatten(), truth, tolerance(backend))
    for ours, right in zip(grads, expected, strict=True):
        assert_close(ours.reshape(right.shape), right, 5 * tolerance(backend))
    margin = tolerance(backend) / TEMPERATURE  # rounding decides about a tie
    least, most = (
        (lead <= slack)[valid.flatten()].double().mean().item() for slack in (-margin, margin)
    )
    assert least - 1e-6 <= parts.accuracy.item() <= most + 1e-6
    assert_close(loss(student, teacher, **options), parts.loss, tolerance(backend))


@backends
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
def test_function_form_equals_a_loop_over_classes(backend, dtype):
    """Batch entries apart, strided labels of any integer dtype, keys that all entries share."""
    student, teacher, labels, valid = problem(2, 9)
    labels, queue = labels.abs(), queue_of((1, 0, 2, 2))
    leaf = student.clone().requires_grad_()
    truth, _ = loop_over_classes(leaf, teacher, labels, valid, "image+queue", queue, TEMPERATURE)
    truth.sum().backward()
    rows = [x.mT.to(device_of(backend)) for x in (student, teacher)]
    if backend == "triton":
        rows = [x.float() for x in rows]
    strided, mask, keys, key_labels = (
        x.to(device_of(backend))
        for x in (labels.to(dtype).T.contiguous().T, valid, queue.keys, queue.key_labels)
    )
    ours = pixel_contrast_loss(
        rows[0].requires_grad_(), rows[1], temperature=TEMPERATURE, labels=strided, valid_mask=mask,
        queue_keys=keys, queue_labels=key_labels.repeat_interleave(2)[::2], backend=backend,
        reduction="none",
    )  # fmt: skip
    (grad,) = torch.autograd.grad(ours.sum(), rows[0])
    assert_close(ours.flatten(), truth, tolerance(backend))
    assert_close(grad.mT, leaf.grad, 5 * tolerance(backend))


@backends
def test_half_precision_and_autocast(backend):
    student, teacher, labels, _ = problem(2, 4, 5)
    device = device_of(backend)
    every = torch.ones_like(labels, dtype=torch.bool)
    truth, _ = loop_over_classes(
        student, teacher, labels, every, "batch+queue", queue_of(), TEMPERATURE
    )
    loss = build(backend, "batch+queue", dtype=torch.float32)
    labels = labels.to(device)
    maps = [x.to(device, torch.float32) for x in (student, teacher)]
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_close(loss(*maps, labels=labels), truth.mean(), 1e-2)
    assert_close(loss(*(x.bfloat16() for x in maps), labels=labels), truth.mean(), 2e-2)


# --- Properties -----------------------------------------------------------------------------------


@backends
@all_negatives
def test_one_label_for_all_leaves_no_negative(backend, negatives):
    """Zero loss and gradient, and every pixel correct."""
    student, teacher, labels, _ = problem(2, 3, 5)
    loss = build(backend, negatives, queue_of((7,) * 4, torch.float32))
    if loss.queue is not None:
        loss.queue.key_labels.fill_(7)
    like = {"device": device_of(backend), "dtype": torch.float32}
    student, teacher = student.to(**like).requires_grad_(), teacher.to(**like)
    parts = loss(
        student,
        teacher,
        labels=torch.full_like(labels, 7).to(student.device),
        return_components=True,
    )
    parts.loss.backward()
    assert parts.loss == 0
    assert parts.accuracy == 1
    assert (student.grad == 0).all()


@backends
@all_negatives
@pytest.mark.parametrize("kind", ["distinct", "negative"])
def test_distinct_or_negative_labels_are_none(backend, negatives, kind):
    student, teacher, labels, valid = problem(2, 3, 5)
    labels = torch.arange(30).view_as(labels) + 100 if kind == "distinct" else -1 - labels.abs()
    with_labels, queue = build(backend, negatives), None
    if with_labels.queue is not None:
        queue = PixelQueue(len(with_labels.queue.keys), WIDTH)
        queue.keys = with_labels.queue.keys
    without = build(backend, negatives, queue) if queue else build(backend, negatives)
    like = next(without.buffers(), student.to(device_of(backend)))
    like = like.float() if backend == "triton" else like
    student, teacher = (x.to(like) for x in (student, teacher))
    valid, labels = valid.to(like.device), labels.to(like.device)
    results = []
    for loss, options in ((without, {}), (with_labels, {"labels": labels})):
        value = loss(student.requires_grad_(), teacher, valid_mask=valid, **options)
        results.append((value, *torch.autograd.grad(value, student)))
    for ours, plain in zip(*results[::-1], strict=True):
        assert_close(ours, plain, tolerance(backend))


@backends
def test_a_pixel_of_the_same_class_changes_nothing(backend):
    """Whatever the teacher has there: it is neither the anchor's positive nor a negative."""
    student, teacher, labels, _ = problem(1, 3, 5)
    labels = labels.abs() % 2
    loss = build(backend, "batch", reduction="none").to(torch.float32)
    maps = [x.to(device_of(backend), torch.float32) for x in (student, teacher)]
    labels = labels.to(device_of(backend))
    before = loss(*maps, labels=labels)
    first = labels[0, 0, 0]
    maps[1][0, :, 0, 0] = torch.randn(WIDTH)
    changed = loss(*maps, labels=labels) != before
    same = labels == first
    same[0, 0, 0] = False
    assert not changed[same].any()
    assert changed[labels != first].all()
    assert changed[0, 0, 0]


def test_labels_become_no_matrix_of_pairs():
    """Blocks hold 2^20 pairs, fewer than there are."""
    student, teacher = torch.randn(2, 1, 4, 33, 33)
    with LargestTensor() as largest:
        loss = PixelContrastLoss(backend="torch")
        loss(student.requires_grad_(), teacher, labels=torch.randint(5, (1, 33, 33))).backward()
    assert largest.size <= 2**20


@pytest.mark.skipif(torch.cuda.is_available(), reason="the number of splits depends on the GPU")
def test_labels_launch_their_conversion_and_nothing_else():
    maps = torch.randn(2, 1, 16, 4, 5)
    labels = torch.randint(5, (1, 4, 5))
    loss = PixelContrastLoss(backend="triton", queue=PixelQueue(9, 16, labels=True))
    plain = PixelContrastLoss(backend="triton", queue=PixelQueue(9, 16))
    names = launches(lambda: loss(*maps, labels=labels))
    assert sorted(names) == sorted([*launches(lambda: plain(*maps)), "_to_copy"])
    labels = labels.int()
    assert len(launches(lambda: loss(*maps, labels=labels))) == len(names) - 1


# --- Arguments ------------------------------------------------------------------------------------

ROWS, LABELS = torch.randn(5, WIDTH), torch.arange(5)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, r"labels must be integers; got torch.float32.*labels.long\(\)", LABELS.float()),
        (TypeError, r"integers; got torch.bool.*labels.argmax\(dim=1\)", LABELS.bool()),
        (TypeError, "labels must be a tensor; got list", [0, 1, 2, 3, 4]),
        (ValueError, r"shape \(5,\); got \(4,\)", LABELS[:4]),
        (ValueError, r"labels must be on cpu; got meta.*labels.to\('cpu'\)", LABELS.to("meta")),
        (ValueError, "Build the queue.*or pass queue_labels", {"queue_keys": ROWS, "labels": LABELS}),
        (ValueError, "labels must be given where", {"queue_keys": ROWS, "queue_labels": LABELS}),
        (ValueError, r"queue_labels .*shape \(3,\); got \(5,\)",
         {"queue_keys": ROWS[:3], "queue_labels": LABELS, "labels": LABELS}),
        (TypeError, "queue_labels must be integers",
         {"queue_keys": ROWS, "queue_labels": ROWS[:, 0], "labels": LABELS}),
    ],
)  # fmt: skip
def test_wrong_labels_of_the_function_form(error, words, arguments):
    arguments = arguments if isinstance(arguments, dict) else {"labels": arguments}
    with pytest.raises(error, match=words):
        pixel_contrast_loss(ROWS, ROWS, **arguments)


def test_labels_of_another_size_name_what_brings_them_to_the_maps():
    maps, labels = torch.randn(2, 2, WIDTH, 4, 5), torch.randint(19, (2, 16, 20))
    loss = PixelContrastLoss()
    with pytest.raises(ValueError, match=r"shape \(2, 4, 5\); got \(2, 16, 20\)") as caught:
        loss(*maps, labels=labels)
    remedy = str(caught.value).split("size: ")[1].rstrip(".")
    resized = eval(remedy, {"F": F, "labels": labels})
    assert torch.equal(resized, labels[:, ::4, ::4])
    loss(*maps, labels=resized)
    with pytest.raises(ValueError, match=r"labels.squeeze\(1\)"):
        loss(*maps, labels=resized.unsqueeze(1))


def test_loss_and_queue_have_labels_or_neither():
    maps, labels = torch.randn(2, 2, WIDTH, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"PixelQueue\(\.\.\., labels=True\)"):
        PixelContrastLoss(queue=PixelQueue(4, WIDTH))(*maps, labels=labels)
    with pytest.raises(ValueError, match="labels must be given where"):
        PixelContrastLoss(queue=PixelQueue(4, WIDTH, labels=True))(*maps)
