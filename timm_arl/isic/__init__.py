"""Which diagnosis a dermoscopic image shows: tasks, data, scores. Knows dermoscopy, knows nothing of ARL."""
from .task import LABELS, TASKS, Task, probabilities_of

__all__ = ['LABELS', 'TASKS', 'Task', 'probabilities_of']
