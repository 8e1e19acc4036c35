"""All subjects, by name."""

from . import af_dcd, contrast, maskd, overhead, peers, row_lse, scaling, step

SUBJECTS = {
    module.name: module
    for module in (
        overhead.SUBJECT,
        step.SUBJECT,
        contrast.SUBJECT,
        row_lse.SUBJECT,
        row_lse.WIDE,
        maskd.SUBJECT,
        af_dcd.SUBJECT,
        peers.SUBJECT,
        scaling.SUBJECT,
    )
}
