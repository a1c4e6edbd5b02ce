"""The context of a request, the scheduler of all requests, and the resources that they share."""
