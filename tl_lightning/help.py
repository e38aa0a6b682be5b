"""How the help is printed."""

from argparse import Action

from jsonargparse import DefaultHelpFormatter

_KNOWN = "known subclasses: "


class Help(DefaultHelpFormatter):
    """The usual help, which for a head lists heads, and not all of the thousand modules that have been imported."""

    def _get_help_string(self, action: Action) -> str:
        text = super()._get_help_string(action)
        before, _, names = text.partition(_KNOWN)
        classes = names.removesuffix(")").split(", ")
        if "torch.nn.Module" not in classes:
            return text
        heads = [name for name in classes if name.startswith("tl_lightning.heads.") and name.endswith("Head")]
        return f"{before}{_KNOWN}{', '.join(heads)})"
