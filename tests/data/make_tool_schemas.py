#!/usr/bin/env python3
"""Write what transformers' get_json_schema makes of tool_functions.py into tool_schemas.json.

python -m pip install 'transformers>=5' jinja2
python tests/data/make_tool_schemas.py
"""

from __future__ import annotations

import json
from pathlib import Path

from tool_functions import FUNCTIONS
from transformers.utils import get_json_schema

if __name__ == "__main__":
    schemas = [get_json_schema(function) for function in FUNCTIONS]
    path = Path(__file__).with_name("tool_schemas.json")
    path.write_text(json.dumps(schemas, indent=1) + "\n", encoding="utf-8")
