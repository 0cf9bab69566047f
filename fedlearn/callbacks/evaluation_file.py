"""Read ``evaluation.json`` of a run folder, the judgement of the final model.

- ``missing``: reason why there are no outputs. At most the entries that follow from counts of real nodes are present.
- ``examples``, ``num_examples``, ``sites``: held-out examples, and their numbers by client.
- ``metrics``: name -> ``value``, ``low`` and ``high`` of the 95 % interval. ``intervals`` states the method.
- ``constant``: metrics of the best constant prediction.
- ``confusion``, ``classes``, ``clinical``, ``curves``, ``calibration``: for a classification.
- ``residuals``: for a regression.
- ``importance``, ``subgroups``: for inputs that are columns of a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EVALUATION_FILE = "evaluation.json"
FORMAT = 1
NOT_WRITTEN = "the run has no evaluation.json"


def read_evaluation(folder: Path) -> Mapping[str, Any]:
    """Return the content of the file. Without the file, the entry ``missing`` states this."""
    path = folder / EVALUATION_FILE
    if not path.is_file():
        return {"missing": NOT_WRITTEN}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return {"missing": "another version of fedlearn wrote evaluation.json"}
    return content
