package main

import (
	"github.com/spf13/cobra"
)

func (a *app) catCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "cat KEY FILE",
		Short: "Write one file of a model to stdout",
		Long: `Cat writes the bytes of one file of a model to stdout. It holds a lease while it
writes, so what comes out is one generation from the first byte to the last.`,
		Example: `  shmctl cat bert config.json | jq .hidden_size
  shmctl cat bert model.safetensors | sha256sum`,
		Args:              takes(2, 2, "KEY FILE"),
		ValidArgsFunction: a.completeKeyAndFile,
		RunE:              func(_ *cobra.Command, args []string) error { return a.cat(args[0], args[1]) },
	}
}

func (a *app) cat(key, file string) error {
	r, err := a.open()
	if err != nil {
		return err
	}
	defer r.Close()
	m, err := r.Get(key)
	if err != nil {
		return suggestKeys(r, key, err)
	}
	defer m.Close()
	if err := hasFile(m, file); err != nil {
		return err
	}
	b, err := m.Bytes(file)
	if err != nil {
		return err
	}
	// In pieces, so that a reader that leaves early does not make us touch
	// every page of a large model.
	const piece = 1 << 20
	for len(b) > 0 {
		n := min(piece, len(b))
		if _, err := a.stdout.Write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}
