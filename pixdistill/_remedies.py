"""What would make a call right: the last sentences of the errors that `_checks` raises."""

from torch import Tensor


def for_maps(student: Tensor, teacher: Tensor, *, channels: bool = True) -> str:
    """What would really bring two maps together: it depends on the axis that differs."""
    s, t = tuple(student.shape), tuple(teacher.shape)
    if len(s) != len(t):
        if {len(s), len(t)} == {3, 4}:
            name, flat, whole = ("student", s, t) if len(s) == 3 else ("teacher", t, s)
            if flat[1] == whole[1] and flat[2] == whole[2] * whole[3]:
                return f"For a flattened map, write {name}.unflatten(2, {whole[2:]})."
            return f"For the tokens of a ViT, use tokens_to_map({name}, grid=(H, W))."
        return "Both need the same number of spatial axes."
    if not 3 <= len(s) <= 5:
        return "For vectors [N, D], use pixdistill.functional.pixel_contrast_loss."
    last_to_second = (0, len(s) - 1, *range(1, len(s) - 1))
    for name, shape, other in (("teacher", t, s), ("student", s, t)):
        permuted = tuple(shape[axis] for axis in last_to_second)
        if shape[2:] != other[2:] and permuted[2:] == other[2:] and permuted[0] == other[0]:
            return f"For a channels-last map, write {name}.permute{last_to_second}."
    if s[0] != t[0]:
        times, rest = divmod(s[0], t[0]) if t[0] > 0 else (0, 1)
        remedy = "index_select(0, index)" if rest else f"repeat_interleave({times}, dim=0)"
        return (
            f"The batch differs, {s[0]} against {t[0]}: pass one teacher map per student map, for "
            f"example teacher.{remedy}."
        )
    remedies = []
    if channels and s[1] != t[1]:
        remedies.append(
            f"Project the student to the teacher's {t[1]} channels, for example with "
            f"nn.Conv{len(s) - 2}d({s[1]}, {t[1]}, 1)."
        )
    if s[2:] != t[2:]:
        mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[len(s)]
        remedies.append(
            f"Resize the student, for example F.interpolate(student, {t[2:]}, mode={mode!r})."
        )
    return " ".join(remedies)


def for_map(name: str, shape: tuple[int, ...], channels: int | None, dims: range) -> str:
    """What would make a map `[B, channels, *spatial]` of this, for so many axes; "" where nothing."""
    last = len(shape) - 1
    if last == 2 and (channels is None or channels == shape[2]):
        return f"For the tokens of a ViT, use tokens_to_map({name}, grid=(H, W))."
    if last == 2 and channels == shape[1]:
        return f"For a flattened map, write {name}.unflatten(2, (H, W))."
    if last + 1 in dims and channels == shape[-1]:
        return f"For a channels-last map, write {name}.permute{(0, last, *range(1, last))}."
    return ""


def for_mask_dtype(name: str, value: object) -> str:
    """What would make a bool tensor of this mask."""
    if not isinstance(value, Tensor):
        return f"Write {name}=torch.as_tensor(mask)."
    if value.is_floating_point():
        return f"Write {name}=mask > 0."
    return f"For a label map, write {name}=labels != 255; for a mask of zeros and ones, {name}=mask > 0."


def for_mask_shape(name: str, got: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """What would bring a mask to the pixels `[B, *spatial]` of a map; "" where nothing."""
    if got in (shape[1:], (1, *shape[1:])):
        return f" Write {name}={name}.expand{shape}."
    if got == (shape[0], 1, *shape[1:]):
        return f" Write {name}={name}.squeeze(1)."
    if got == (shape[0], *shape[:0:-1]):
        return f" Write {name}={name}.transpose(1, -1)."
    if (
        len(shape) == 3
        and (len(got) == 3 or (len(got) == 4 and got[1] == 1))
        and got[0] == shape[0]
    ):
        channel = "[:, None]" if len(got) == 3 else ""
        return (
            f" Bring it to the map's size: F.interpolate({name}{channel}.float(), {shape[1:]}, "
            'mode="nearest")[:, 0] > 0.'
        )
    return ""
