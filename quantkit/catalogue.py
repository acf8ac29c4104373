"""What `quantkit list` shows."""

from quantkit import methods, presets

KINDS = ("methods", "pruners", "presets", "models", "calibrations", "formats")


def rows(kind: str) -> list[dict[str, str]]:
    """Return one row per thing of a kind, as column name → text."""
    if kind == "methods":
        return [
            {"method": name, "what it does": methods.summary("quantizers", name)}
            for name in methods.names("quantizers")
        ]
    if kind == "pruners":
        return [{"method": name, "what it does": methods.summary("pruners", name)} for name in methods.names("pruners")]
    if kind == "presets":
        return [{"preset": name, "what it does": text} for name, text in presets.DESCRIPTIONS.items()]
    if kind == "formats":
        return [
            {"format": name, "what it is": methods.summary("exporters", name)} for name in methods.names("exporters")
        ]
    if kind == "calibrations":
        from quantkit.calibrate.text import SELF, SELF_DESCRIPTION, mixes

        described = {mix.name: mix.description for mix in mixes().values()} | {SELF: SELF_DESCRIPTION}
        return [{"text": name, "what it is": description} for name, description in described.items()]
    from quantkit.model.names import aliases

    return [
        {"alias": name, "model": alias.id or "(ships with quantkit)", "revision": (alias.revision or "")[:12]}
        for name, alias in aliases().items()
    ]
