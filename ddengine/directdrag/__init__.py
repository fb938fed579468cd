"""DirectDrag, stage by stage: drag editing from points alone, with no mask and no prompt."""
