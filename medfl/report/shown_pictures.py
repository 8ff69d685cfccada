"""The section of the sites' own pictures, as many as the page has room for."""

import base64
from collections import Counter

from medfl.report.cells import Section
from medfl.report.pictures import CAPTIONS, PLACE, Picture, arm_words
from medfl.report.tables import Run, ordered_sites


def section(run: Run, room: int) -> Section:
    """For the template, {} without pictures.

    Args:
        room: bytes of the page that the pictures may take. The first that does not fit ends them.
    """
    if not run.pictures:
        return {}
    order = ordered_sites(run)
    listed = sorted(run.pictures, key=lambda p: (order.index(p.site) if p.site in order else len(order), p.site))
    addresses = [_address(picture) for picture in listed]
    sizes = [len(address) for address in addresses]
    fitting = sum(sum(sizes[: at + 1]) <= room for at in range(len(sizes)))
    sites = dict.fromkeys(picture.site for picture in listed[:fitting])
    left = Counter(picture.site for picture in listed[fitting:])
    return {
        "sites": [
            (site, [_figure(p, a) for p, a in zip(listed[:fitting], addresses, strict=False) if p.site == site])
            for site in sites
        ],
        "left_out": ", ".join(f"{site} ({count})" for site, count in left.items()),
        "place": PLACE.as_posix(),
    }


def _address(picture: Picture) -> str:
    """An address that holds the picture itself."""
    return f"data:image/png;base64,{base64.b64encode(picture.content).decode()}"


def _figure(picture: Picture, address: str) -> Section:
    return {"caption": f"{CAPTIONS[picture.name]}. Arm {arm_words(picture.arm)}", "address": address}
