"""The client for asyncio.

    async with secateur.aio.Client("localhost:50051") as client:
        result = await client.prune(model, secateur.global_unstructured("*.weight", 0.5))

`Client` has the methods of `secateur.Client`, as coroutines.
"""

from secateur.aio.client import Client

__all__ = ["Client"]
