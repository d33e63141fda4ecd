"""The angles of all triplets of samples, from their squared distances alone."""
