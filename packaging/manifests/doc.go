// Package manifests reads the examples for Kubernetes and Docker Compose as their
// programs would, without a cluster and without a daemon: into the types of k8s.io/api,
// refusing every field that they do not have, and with the loader of docker compose. It
// is a module of its own so that nobody else needs those libraries.
package manifests
