"""Protocols by name, the project's own and those that other packages registered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memvec import registry

if TYPE_CHECKING:
    from memvec.lab.protocols.protocol import Protocol


def protocol_names() -> list[str]:
    """Every name that a spec may use."""
    return registry.names("protocol")


def protocol_of(name: str) -> Protocol:
    """The protocol of this name. Raises MemvecError, with the nearest name, if there is none."""
    protocol: Protocol = registry.get("protocol", name)(name)
    return protocol


def plane_of(name: str) -> str:
    """The plane in which a protocol's rows are compared; its name where it has its own."""
    return protocol_of(name).plane or name
