"""opencode's event types (1.18, all 89 of its schema) and how each may be treated under overflow.

``PART`` and the like are families: types of one family with the same key speak of the same thing, and a ``latest`` or
``required`` one settles it. ``key`` is a path into the properties, several joined by ``/``; ``""`` is the instance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from .delivery import DeliveryClass, KeyFunction


class Row(NamedTuple):
    """One event type. ``append`` names the property whose texts add up."""

    type: str
    delivery_class: DeliveryClass
    family: str | None = None
    key: str | None = None
    append: str | None = None


E: Final = "ephemeral"
L: Final = "latest"
R: Final = "required"

OPENCODE: Final = (
    # Messages and what they are made of.
    Row("message.updated", L, "message", "info.id"),
    Row("message.removed", R, "message", "messageID"),
    Row("message.part.updated", L, "part", "part.id"),
    Row("message.part.delta", E, "part", "partID", append="delta"),
    Row("message.part.removed", R, "part", "partID"),
    # Sessions.
    Row("session.created", R),
    Row("session.updated", L, "session", "sessionID"),
    Row("session.deleted", R, "session", "sessionID"),
    Row("session.status", L, None, "sessionID"),
    Row("session.diff", L, None, "sessionID"),
    Row("session.idle", R),
    Row("session.error", R),
    Row("session.compacted", R),
    Row("todo.updated", L, None, "sessionID"),
    Row("command.executed", R),
    # Questions to the user: whoever misses one waits for ever.
    Row("permission.asked", R),
    Row("permission.replied", R),
    Row("permission.v2.asked", R),
    Row("permission.v2.replied", R),
    Row("question.asked", R),
    Row("question.replied", R),
    Row("question.rejected", R),
    Row("question.v2.asked", R),
    Row("question.v2.replied", R),
    Row("question.v2.rejected", R),
    # The next generation of session events: a log, in which deltas are settled by what ends them.
    Row("session.next.agent.switched", R),
    Row("session.next.model.switched", R),
    Row("session.next.moved", R),
    Row("session.next.prompted", R),
    Row("session.next.prompt.admitted", R),
    Row("session.next.context.updated", L, None, "messageID"),
    Row("session.next.synthetic", R),
    Row("session.next.shell.started", R),
    Row("session.next.shell.ended", R),
    Row("session.next.step.started", R),
    Row("session.next.step.ended", R),
    Row("session.next.step.failed", R),
    Row("session.next.text.started", R),
    Row("session.next.text.delta", E, "next.text", "assistantMessageID/textID", append="delta"),
    Row("session.next.text.ended", R, "next.text", "assistantMessageID/textID"),
    Row("session.next.reasoning.started", R),
    Row("session.next.reasoning.delta", E, "next.reasoning", "assistantMessageID/reasoningID", append="delta"),
    Row("session.next.reasoning.ended", R, "next.reasoning", "assistantMessageID/reasoningID"),
    Row("session.next.tool.input.started", R),
    Row("session.next.tool.input.delta", E, "next.input", "assistantMessageID/callID", append="delta"),
    Row("session.next.tool.input.ended", R, "next.input", "assistantMessageID/callID"),
    Row("session.next.tool.called", R),
    Row("session.next.tool.progress", L, "next.tool", "assistantMessageID/callID"),
    Row("session.next.tool.success", R, "next.tool", "assistantMessageID/callID"),
    Row("session.next.tool.failed", R, "next.tool", "assistantMessageID/callID"),
    Row("session.next.retried", R),
    Row("session.next.compaction.started", R),
    Row("session.next.compaction.delta", E, "next.compaction", "messageID", append="text"),
    Row("session.next.compaction.ended", R, "next.compaction", "messageID"),
    Row("session.next.revert.staged", L, "next.revert", "sessionID"),
    Row("session.next.revert.cleared", R, "next.revert", "sessionID"),
    Row("session.next.revert.committed", R, "next.revert", "sessionID"),
    # Files, projects, workspaces.
    Row("file.edited", L, None, "file"),
    Row("file.watcher.updated", L, None, "file"),
    Row("project.updated", L, None, "id"),
    Row("project.directories.updated", L, None, "projectID"),
    Row("vcs.branch.updated", L, None, ""),
    Row("workspace.ready", R),
    Row("workspace.failed", R),
    Row("workspace.status", L, None, "workspaceID"),
    Row("worktree.ready", R),
    Row("worktree.failed", R),
    # Terminals and the terminal UI.
    Row("pty.created", R),
    Row("pty.updated", L, "pty", "info.id"),
    Row("pty.exited", R),
    Row("pty.deleted", R, "pty", "id"),
    Row("tui.prompt.append", R),
    Row("tui.command.execute", R),
    Row("tui.toast.show", R),
    Row("tui.session.select", R),
    # "Look again": of several only the last matters.
    Row("models-dev.refreshed", L, None, ""),
    Row("integration.updated", L, None, ""),
    Row("integration.connection.updated", L, None, "integrationID"),
    Row("catalog.updated", L, None, ""),
    Row("reference.updated", L, None, ""),
    Row("lsp.updated", L, None, ""),
    Row("mcp.tools.changed", L, None, "server"),
    Row("installation.updated", L, None, ""),
    # The rest.
    Row("installation.update-available", R),
    Row("mcp.browser.open.failed", R),
    Row("plugin.added", R),
    Row("server.connected", R),
    Row("server.instance.disposed", R),
    Row("global.disposed", R),
)


def builtin_delivery_classes(register: Callable[..., None]) -> None:
    """Register opencode's table."""
    for row in OPENCODE:
        key = None if row.key is None else _key(row.key)
        register(row.type, row.delivery_class, key, family=row.family, append=row.append)


def _key(path: str) -> KeyFunction:
    """From ``info.id`` or ``messageID/callID`` to a function of the properties."""
    paths = [part.split(".") for part in path.split("/") if part]

    def key(properties: Mapping[str, Any]) -> str | None:
        found = []
        for names in paths:
            value: Any = properties
            for name in names:
                value = value[name]
            if not isinstance(value, str):
                return None
            found.append(value)
        return "/".join(found)

    return key
