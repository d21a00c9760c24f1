"""The gradient of a tied parameter, use by use: from the autograd graph of a split step to the inner products of its contributions.

Beside the pipe's measuring: `splits` arms a step and takes its parts, `calls` notes which module made which operations, `graph` finds the
operations that use a parameter, `contributions` gathers what each of them adds to the gradient, `gram` multiplies. What they give is a
`Split` in the record; statistics follow from it in `paramwatch.agreement`. The forward pass is not touched, and the backward pass is only
looked at.
"""
