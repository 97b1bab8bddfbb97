"""The command line of transformers with our architectures in it: `python -m emo_select.serving.transformers_cli serve`.

Its server takes a model's class by name from the package itself, not by the Auto classes.
"""

from __future__ import annotations


def main() -> None:
    """Run it."""
    import transformers
    from transformers.cli.transformers import main as run

    from emo_select import models
    from emo_select.models.registration import ARCHITECTURES, register

    register()
    for _, _, causal in ARCHITECTURES.values():
        setattr(transformers, causal, getattr(models, causal))
    run()


if __name__ == "__main__":
    main()
