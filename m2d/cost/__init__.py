"""What the workflow's jobs take: sizes to resources, and the plan of a target before it runs."""
