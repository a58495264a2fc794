"""The class of all settings with the default recipe, to build settings in a test without a job file."""

from fnet_dist.config.load_recipe import DEFAULT_RECIPE
from fnet_dist.config.schema import config_class

FashionConfig = config_class(DEFAULT_RECIPE)
