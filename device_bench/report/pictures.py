"""The pictures that questions are about, as data URIs; a picture is drawn once, however often it is shown."""

from functools import cache

from device_bench.pictures import data_uri
from vlm.data.records import SCENES, load_image


@cache
def picture(image: str | None) -> str | None:
    """Data URI of a built-in scene ("scenes:950001"), or None for pictures that are not drawn but kept elsewhere."""
    if image is None or not image.startswith(SCENES):
        return None
    return data_uri(load_image(image))
