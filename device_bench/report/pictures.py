"""The pictures that questions are about, as data URIs; a picture is drawn once, however often it is shown."""

import base64
import io
from functools import cache

from vlm.data.records import SCENES, load_image

_QUALITY = 85


@cache
def picture(image: str | None) -> str | None:
    """Data URI of a built-in scene ("scenes:950001"), or None for pictures that are not drawn but kept elsewhere."""
    if image is None or not image.startswith(SCENES):
        return None
    buffer = io.BytesIO()
    load_image(image).save(buffer, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
