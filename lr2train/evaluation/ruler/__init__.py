"""RULER (Hsieh et al., 2024): 13 synthetic tasks whose prompts fill any length.

``tasks`` builds the tasks, ``make`` shares the making of samples among ranks, and ``tables`` turns scores into the
tables of the paper.

Choice: names, parameters, texts and grading are those of NVIDIA's repository; the generators are our own. A sample
depends on the tokenizer, its task, its length, the seed and its number alone, and every sample is fitted to its length
by itself. Cost: the samples are not NVIDIA's, only drawn in the same way.
"""

from lr2train.evaluation.ruler.spec import ESSAYS, NAMES
from lr2train.evaluation.ruler.suite import tasks
from lr2train.evaluation.ruler.task import RulerTask

__all__ = ["ESSAYS", "NAMES", "RulerTask", "tasks"]
