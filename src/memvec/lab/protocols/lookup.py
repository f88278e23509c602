"""Protocols by name, the project's own and those that other packages registered."""

from __future__ import annotations

from typing import Any

from memvec import registry


def protocol_names() -> list[str]:
    """Every name that a spec may use."""
    return registry.names("protocol")


def protocol_of(name: str) -> Any:
    """The protocol of this name, a `memvec.lab.protocols.protocol.Protocol`.

    Raises MemvecError, with the nearest name, if there is none. The type is not imported: a
    protocol needs specs, stores and reports, which look protocols up here.
    """
    return registry.get("protocol", name)(name)


def plane_of(name: str) -> str:
    """The plane in which a protocol's rows are compared; its name where it has its own."""
    return str(protocol_of(name).plane or name)
