"""Example pictures and their drags (`demo.json`), installed as `ddengine.examples`; data only."""
