"""The controller's half of the module `files`: what each file is to hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase
from ansible.template import generate_ansible_template_vars, trust_as_template


class ActionModule(ActionBase):
    """Renders the templates and reads the files of one task; the module brings them all to the machine in one call."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> Any:
        """Return what the module says of all files together."""
        super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        files = [file for entry in arguments["files"] for file in self.spread(entry, task_vars or {})]
        return self._execute_module(module_name="files", module_args=arguments | {"files": files}, task_vars=task_vars)

    def spread(self, entry: dict[str, Any], variables: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield an entry once, or for each of its `each`: the `item` of the template, and `%s` in names."""
        entry = dict(entry)
        if not boolean(entry.pop("when", True)):
            return
        for item in entry.pop("each", [None]):
            file = dict(entry)
            own = file.pop("vars", {})
            if item is not None:
                own = own | {"item": item}
                file["path"] = file["path"].replace("%s", Path(item).name)
                file |= {source: file[source].replace("%s", item) for source in ("template", "copy") if source in file}
            if "template" in file:
                file["content"] = self.render(file.pop("template"), variables | own)
            elif "copy" in file:
                file["content"] = self.read(self._find_needle("files", file.pop("copy")))
            yield file

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """Return a template's text; templates are found where ansible.builtin.template finds them."""
        path = self._find_needle("templates", template)
        own = generate_ansible_template_vars(path=template, fullpath=path)
        templar = self._templar.copy_with_new_env(
            searchpath=[str(Path(path).parent)], available_variables=variables | own
        )
        text = templar.template(trust_as_template(self.read(path)), escape_backslashes=False)
        return str(text or "")

    def read(self, path: str) -> str:
        """Return a file's text; one that cannot be read fails the task."""
        try:
            return str(self._loader.get_text_file_contents(path))
        except OSError as error:
            raise AnsibleActionFail(f"{path}: {error.strerror}") from error
