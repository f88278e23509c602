"""Protocols by name: those of memvec and those that other packages registered."""

from __future__ import annotations

from typing import Any

from memvec import registry


def protocol_names() -> list[str]:
    """Every name that a spec may use."""
    return registry.names("protocol")


def protocol_of(name: str) -> Any:
    """The protocol of this name, a `memvec.lab.protocols.protocol.Protocol`.

    Raises MemvecError, with the nearest name, if there is none. The type is not imported, because
    protocols import specs and reports, which import this module.
    """
    return registry.get("protocol", name)(name)


def plane_of(name: str) -> str:
    """The plane in which a protocol's rows are compared; the protocol's name by default."""
    return str(protocol_of(name).plane or name)
