"""Keeps the garbage collector away from all that is imported so far: ZeRO-3 collects once per engine. Imported last."""

import gc

gc.collect()
gc.freeze()
