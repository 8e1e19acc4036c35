"""Single faults of the package, each of which some test has to notice; run.py puts them in.

To add one: the function (or class, or "" for the file), what is wrong, a piece of its code that occurs
once there, the faulty piece, and the test that notices it. `$name` stands for any identifier.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """One replacement within one function."""

    file: str
    where: str
    what: str
    text: str
    faulty: str
    test: str


def faults(file: str, *lines: tuple[str, str, str, str, str]) -> list[Fault]:
    """The faults of one file; the test is given as "file::name" below tests/test_."""
    return [
        Fault(f"pixdistill/{file}", *rest, "tests/test_" + test.replace("::", ".py::test_"))
        for *rest, test in lines
    ]


FAULTS = [
    *faults(
        "_checks.py",
        (
            "positive",
            "infinity is a temperature",
            "not 0 < $number < math.inf",
            "not 0 < $number",
            "pixel_contrast::wrong_settings",
        ),
        (
            "positive",
            "zero is a temperature",
            "not 0 < $number < math.inf",
            "not 0 <= $number < math.inf",
            "pixel_contrast::wrong_settings",
        ),
        (
            "fraction",
            "one is no fraction",
            "0 <= $number <= 1",
            "0 <= $number < 1",
            "af_dcd::the_mask_drops_a_fraction_of_pixels_in_train_mode_only",
        ),
        (
            "integer",
            "any integer will do",
            "$number < minimum",
            "$number < -minimum",
            "every_loss::integers_may_be_of_numpy_and_not_words",
        ),
        (
            "pair",
            "three sizes are a pair",
            "len($sizes) != 2",
            "len($sizes) < 2",
            "every_loss::pairs_may_be_any_sequence_of_two",
        ),
        (
            "flag",
            "anything is a flag",
            "not isinstance($value, bool)",
            "$value is None",
            "every_loss::flags_are_true_or_false",
        ),
        (
            "choice",
            "only the type of a choice counts",
            "or $value not in choices",
            "",
            "every_loss::choices_name_what_they_are",
        ),
        (
            "floating",
            "float8 is a dtype like others",
            "$tensor.dtype not in FLOAT_DTYPES",
            "not $tensor.dtype.is_floating_point",
            "every_loss::other_dtypes_are_named",
        ),
        (
            "floating",
            "a mapping is not named",
            "isinstance($tensor, Mapping)",
            "isinstance($tensor, int)",
            "every_loss::a_mapping_for_a_map_is_named",
        ),
        (
            "maps",
            "the teacher's device does not matter",
            'device("teacher", teacher, student)',
            "pass",
            "every_loss::another_device_is_named",
        ),
        (
            "maps",
            "student and teacher may be swapped",
            "swapped(student, teacher)",
            "pass",
            "every_loss::student_and_teacher_swapped_is_named",
        ),
        (
            "swapped",
            "a teacher that requires a gradient is always refused",
            "and not student.requires_grad",
            "",
            "every_loss::the_teacher_never_gets_a_gradient",
        ),
        (
            "swapped",
            "an evaluation is refused",
            "torch.is_grad_enabled() and",
            "",
            "every_loss::student_and_teacher_swapped_is_named",
        ),
        (
            "mask",
            "the mask's device does not matter",
            "device(name, $value, like)",
            "pass",
            "every_loss::another_device_is_named",
        ),
        (
            "mask",
            "a mask of any dtype will do",
            "or $value.dtype != torch.bool",
            "",
            "every_loss::a_mask_that_is_none_says_what_to_write",
        ),
        (
            "mask",
            "a mask is advised to be inverted",
            "labels != 255",
            "labels == 255",
            "every_loss::a_mask_that_is_none_says_what_to_write",
        ),
        (
            "_remedy",
            "a batch that differs is to be resized",
            "if $s[0] != $t[0]:",
            "if False:",
            "every_loss::shapes_that_differ_are_named_with_a_remedy_that_fits",
        ),
        (
            "_remedy",
            "the student is to be resized to its own size",
            "F.interpolate(student, {t[2:]}",
            "F.interpolate(student, {s[2:]}",
            "every_loss::shapes_that_differ_are_named_with_a_remedy_that_fits",
        ),
        (
            "_mask_remedy",
            "a mask with a channel is not told to squeeze",
            "(shape[0], 1, *shape[1:])",
            "(shape[0], 2, *shape[1:])",
            "every_loss::a_mask_that_is_none_says_what_to_write",
        ),
        (
            "_real",
            "True is a number",
            "isinstance($value, bool) or",
            "",
            "every_loss::numbers_may_be_of_numpy_and_not_words",
        ),
        (
            "_index",
            "True is an integer",
            "not isinstance($value, (bool, Tensor))",
            "not isinstance($value, Tensor)",
            "every_loss::integers_may_be_of_numpy_and_not_words",
        ),
    ),
    *faults(
        "ops/backend.py",
        (
            "choose",
            "a kernel is launched with shapes alone",
            'return "torch" if without_data() else "triton"\n    if',
            'return "triton"\n    if',
            "training_loops::shapes_of_a_loss_that_would_launch_kernels",
        ),
        (
            "sum_dtype",
            "sums of float64 are float32",
            "if $tensor.dtype == torch.float64",
            "if $tensor.dtype == torch.float16",
            "every_loss::equals_the_loss_as_people_write_it",
        ),
        (
            "operand_dtype",
            "autocast casts float64 too",
            "and $tensor.dtype != torch.float64",
            "",
            "every_loss::autocast_leaves_float64_alone",
        ),
        (
            "operand_dtype",
            "autocast is asked on the meta device",
            '$kind != "meta" and',
            "",
            "every_loss::a_module_on_the_meta_device_computes_shapes",
        ),
        (
            "detached",
            "a tensor of inference mode is saved for backward",
            "tensor.clone() if tensor.is_inference() else tensor.detach()",
            "tensor.detach()",
            "pixel_contrast::teacher_mask_and_keys_may_come_from_inference_mode",
        ),
        (
            "refuse_transforms",
            "transforms of torch.func are let through",
            "torch._C._are_functorch_transforms_active()",
            "False",
            "every_loss::transforms_of_torch_func_raise_and_reference_works",
        ),
        (
            "FirstOrderOnly.backward",
            "a second-order gradient is silently zero",
            "raise RuntimeError(",
            "return None, None, str(",
            "every_loss::double_backward_raises_or_is_right",
        ),
    ),
]
