"""The flow table as people read it: a picture of who may talk to whom, and a table with the reasons."""

from collections.abc import Mapping, Sequence
from typing import Any


def ports_of(flow: Mapping[str, Any]) -> str:
    """Return a flow's port, or its range, as text; with its protocols where they are not TCP alone."""
    ports = (
        f"{flow['port']}-{flow['through']}" if flow.get("through") not in (None, flow["port"]) else str(flow["port"])
    )
    protocols = flow.get("protocol", ["tcp"])
    return ports if protocols == ["tcp"] else f"{ports} {'+'.join(protocols)}"


def flows_picture(flows: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown: a Mermaid picture with an arrow for each pair, and the flows with their reasons."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for flow in flows:
        ports = pairs.setdefault((flow["from"], flow["to"]), [])
        if ports_of(flow) not in ports:
            ports.append(ports_of(flow))
    arrows = [f'    {source} -->|"{", ".join(ports)}"| {target}' for (source, target), ports in pairs.items()]
    rows = [
        f"| {flow['from']} | {flow['to']} | {ports_of(flow)} | {', '.join(flow.get('by', []))} | {flow['why']} |"
        for flow in flows
    ]
    table = ["| from | to | port | by | why |", "|---|---|---|---|---|", *rows]
    return "\n".join(["```mermaid", "flowchart LR", *arrows, "```", "", *table])


class FilterModule:
    """Ansible's way to find filters."""

    def filters(self) -> dict[str, object]:
        """Return the filters of this file by name."""
        return {"flows_picture": flows_picture}
