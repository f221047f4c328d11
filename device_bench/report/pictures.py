"""The pictures that questions are about, as data URIs; a picture is drawn once, however often it is shown."""

import base64
import io
import re
from functools import cache

from vlm.data.scenes.draw import render
from vlm.data.scenes.scene import make_scene

_SCENE = re.compile(r"scenes:(\d+)")
_QUALITY = 85


@cache
def picture(image: str | None) -> str | None:
    """Data URI of a built-in scene ("scenes:950001"), or None for pictures that are not drawn but kept elsewhere."""
    found = _SCENE.fullmatch(image or "")
    if found is None:
        return None
    buffer = io.BytesIO()
    render(make_scene(int(found[1]))).save(buffer, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
