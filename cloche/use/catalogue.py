"""`cloche list`: what there is, generated from the tables themselves, so that it cannot drift from them."""

import json
from typing import Any

from cloche.config import choices, keys_of, show
from cloche.data.read.builtin import BUILTIN
from cloche.recipe import TrainConfig, find, kinds_of, schema, shipped
from cloche.words import _

WHICH = {"nets": "net", "tasks": "task", "data": "data", "optim": "optim"}


def catalogue(what: str) -> tuple[Any, str]:
    """(for --json, for the eye)."""
    if what == "schema":
        found = schema()
        return found, json.dumps(found, indent=1, ensure_ascii=False)
    if what == "recipes":
        return _recipes()
    kinds = {"train": TrainConfig} if what == "train" else kinds_of(WHICH[what])
    table = "train" if what == "train" else WHICH[what]
    found = {kind: {key: _field(field) for key, field in keys_of(config, table).items()} for kind, config in kinds.items()}
    lines = []
    for kind, keys in found.items():
        lines.append(f"[{table}]" + (f' kind = "{kind}"' if what != "train" else ""))
        lines += [
            f"  {key:<24} {f['default']:<22} {f['meaning']}" + (f"  ({', '.join(f['choices'])})" if f["choices"] else "")
            for key, f in keys.items()
            if not key.endswith(".kind")
        ]
        lines.append("")
    if what == "data":
        lines.append(_("sets that need no download: {names}").format(names=", ".join(BUILTIN)))
    return found, "\n".join(lines).rstrip()


def _field(field: Any) -> dict[str, Any]:
    default = "" if field.is_required() else show(field.get_default(call_default_factory=True)) if field.default is not None else "–"
    return {"default": default, "meaning": field.description or "", "choices": choices(field)}


def _recipes() -> tuple[Any, str]:
    found = {}
    for name in shipped():
        _word, raw = find(f"recipe:{name}", None)
        found[name] = {"net": raw["net"]["kind"], "data": raw["data"]["source"], "expect": raw.get("expect", {})}
    about = _("about {s} s")
    rows = [f"  {n:<20} {r['net']:<12} {r['data']:<16} " + about.format(s=r["expect"].get("seconds", "?")) for n, r in found.items()]
    return found, "\n".join([_("cloche train RECIPE, with one of:"), *rows])
