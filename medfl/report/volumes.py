"""The section on fused and segmented images: who holds what, and scores by arm and region."""

from collections.abc import Sequence

from medfl.report import segmentation, summary
from medfl.report.cells import NONE, Section, form_of, row, tag
from medfl.report.scores import REFERENCE, VOLUMES
from medfl.report.summary import Comparison, Estimate
from medfl.report.tables import Run, study_node
from medfl.report.words import TITLES

FUSION = {
    "ssim": ("SSIM", "likeness of structure to each source, 1 is equal"),
    "psnr": ("PSNR", "closeness to each source in dB; 20 is a distance of a tenth of the grey scale"),
    "nmi": ("NMI", "information shared with each source, from 1 (none) to 2 (all)"),
    "sfr": ("SFR", "fine detail, as a share of the sources' own; above 1 is sharper than they are"),
    "rsfe": ("rSFe", "fine detail against the sharpest source at every place; 0 is as much"),
    "fsim": ("FSIM", "likeness of edges in slices, 1 is equal"),
    "vifp": ("VIFP", "visual information kept in slices, 1 is all"),
    "ifcp": ("IFC", "information shared in slices, approximated by pixels; higher is more"),
}


def section(run: Run) -> Section:
    """For the template; {} where no modalities are told and no such score was written."""
    modalities = list(dict.fromkeys(name for site in run.sites for name in site.modalities))
    measured = any(score.protocol in VOLUMES for score in run.scores)
    if not (modalities or measured):
        return {}
    return {
        "modalities": modalities,
        "owners": _owners(run, modalities),
        "fusion": _fusion(run),
        "segmentation": segmentation.table(run, segmentation.SEGMENTATION),
        "asked": _asked(run),
    }


def _asked(run: Run) -> list[str]:
    """The protocols of volumes that are to be measured; all where the study does not say."""
    listed = study_node(run, "evaluation").get("protocols")
    return [name for name in VOLUMES if not isinstance(listed, list) or name in listed]


def _owners(run: Run, modalities: Sequence[str]) -> list[Section]:
    """Site by site the training images that have each modality, and those with a mask."""
    return [
        {
            "name": site.name,
            "tag": "unseen" if site.held_out else "",
            "counts": [_count(site.modalities.get(name, 0)) for name in modalities],
            "labelled": _count(site.labelled),
        }
        for site in run.sites
        if site.modalities
    ]


def _fusion(run: Run) -> Section:
    """The first measure by site and all measures as means, each beside that of the mean of the sources."""
    scores = {name: found for name in FUSION if (found := summary.compare_arms(run, "fusion", name)).cells}
    if not scores:
        return {}
    plain = {name: summary.compare_arms(run, REFERENCE, name) for name in scores}
    name, first = next(iter(scores.items()))
    arms = first.arms
    rows = [
        row(site, [_of_any(plain[name], site), *(first.cells.get((arm, site)) for arm in arms)], tag(first, site))
        for site in (*first.compared, *first.left_out, *first.unseen)
        if any((arm, site) in first.cells for arm in arms)
    ]
    means = {measure: [_of_any(plain[measure], ""), *(scores[measure].mean(arm) for arm in arms)] for measure in scores}
    return {
        "metric": FUSION[name][0],
        "columns": ["Mean of the sources", *(TITLES[arm] for arm in arms)],
        "sites": [*rows, row("Mean", means[name], whole=True)],
        "means": [row(FUSION[n][0], found, form=form_of(n)) for n, found in means.items()],
        "over": len(first.compared),
        "readings": [FUSION[measure] for measure in scores],
    }


def _of_any(scores: Comparison, site: str) -> Estimate | None:
    """What is the same in every arm, at a site, or the mean over the sites for ""."""
    found = [scores.cells.get((arm, site)) if site else scores.mean(arm) for arm in scores.arms]
    return next((known for known in found if known), None)


def _count(number: int) -> str:
    return f"{number:,}" if number else NONE
