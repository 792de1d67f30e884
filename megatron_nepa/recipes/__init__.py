"""Named starting points: a recipe is a function that returns the config of a run."""

from megatron_nepa.recipes.finetuning import CLASSIFICATION_RECIPES
from megatron_nepa.recipes.pretraining import PRETRAINING_RECIPES
from megatron_nepa.recipes.probing import PROBING_RECIPES
from megatron_nepa.recipes.segmentation import SEGMENTATION_RECIPES

__all__ = ["CLASSIFICATION_RECIPES", "PRETRAINING_RECIPES", "PROBING_RECIPES", "SEGMENTATION_RECIPES"]
