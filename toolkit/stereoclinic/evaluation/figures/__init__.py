"""The figures of a comparison. Importing this package registers all of them (see `registry`)."""

from stereoclinic.evaluation.figures import bias, side_effects

__all__ = ["bias", "side_effects"]
