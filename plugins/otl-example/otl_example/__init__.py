"""An example of an OTL plugin. diffusers looks for the classes of a saved folder here."""

from otl_example.networks import BlockTransformer as BlockTransformer
from otl_example.networks import WordEncoder as WordEncoder
from otl_example.pipeline import ExamplePipeline as ExamplePipeline
