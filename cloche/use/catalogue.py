"""`cloche list`: what there is, generated from the tables themselves, so that it cannot drift from them."""

import json
from typing import Any

from cloche.config import choices, keys_of, show
from cloche.data.read.builtin import BUILTIN
from cloche.recipe import SINGLE, find, kinds_of, schema, shipped
from cloche.words import _

WHICH = {"nets": "net", "tasks": "task"}  # the others are called like their table


def catalogue(what: str) -> tuple[Any, str]:
    """(for --json, for the eye)."""
    if what == "schema":
        return schema(), json.dumps(schema(), indent=1, ensure_ascii=False)
    if what == "recipes":
        raw = {name: find(f"recipe:{name}", None)[1] for name in shipped()}
        found = {name: {"net": r["net"]["kind"], "data": r["data"]["source"], "expect": r.get("expect", {})} for name, r in raw.items()}
        about = _("about {s} s")
        rows = [f"  {n:<20} {r['net']:<12} {r['data']:<16} " + about.format(s=r["expect"].get("seconds", "?")) for n, r in found.items()]
        return found, "\n".join([_("cloche train RECIPE, with one of:"), *rows])
    table = WHICH.get(what, what)
    kinds = {table: SINGLE[table]} if table in SINGLE else kinds_of(table)
    found = {kind: {key: _field(field) for key, field in keys_of(config, table).items()} for kind, config in kinds.items()}
    lines = []
    for kind, keys in found.items():
        lines.append(f"[{table}]" if table in SINGLE else f'[{table}] kind = "{kind}"')
        for key, f in keys.items():
            if not key.endswith(".kind"):
                lines.append(f"  {key:<24} {f['default']:<22} {f['meaning']}" + (f"  ({', '.join(f['choices'])})" if f["choices"] else ""))
        lines.append("")
    if what == "data":
        lines.append(_("sets that need no download: {names}").format(names=", ".join(BUILTIN)))
    return found, "\n".join(lines).rstrip()


def _field(field: Any) -> dict[str, Any]:
    default = "" if field.is_required() else show(field.get_default(call_default_factory=True)) if field.default is not None else "–"
    return {"default": default, "meaning": field.description or "", "choices": choices(field)}
