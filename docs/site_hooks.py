"""`make docs`: links to files outside of docs/ become plain names, since the site does not hold
them.
"""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]*)\]\((\.\./[^)]*)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _OUTSIDE.sub(
        lambda found: f"{found[1]} (`{found[2].removeprefix('../')}`)", markdown
    )
