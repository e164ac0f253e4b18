//go:build amd64 || arm64

package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/onecopy/onecopy/registry"
)

// servePlan is what a server of rollouts is told.
type servePlan struct {
	Dir, Key, Socket string
}

// answer is what a server read from its model while it had one request.
type answer struct {
	Generation uint64   `json:"generation"`
	Tags       []uint64 `json:"tags"` // from several places of every file
	Error      string   `json:"error,omitempty"`
}

// notice is what a server tells the coordinator.
type notice struct {
	Generation uint64 // it serves this one, and has given back the one before
	At         int64  // clock
}

func serve(arg json.RawMessage) error {
	var p servePlan
	if err := json.Unmarshal(arg, &p); err != nil {
		return err
	}
	ended := untilEnd()
	reg, err := registry.Open(p.Dir, nil)
	if err != nil {
		return err
	}
	defer reg.Close()
	s := &server{reg: reg, key: p.Key, say: json.NewEncoder(os.Stdout)}
	if err := s.change(); err != nil {
		return err
	}
	l, err := net.Listen("unix", p.Socket)
	if err != nil {
		return err
	}
	h := &http.Server{Handler: s, ReadHeaderTimeout: time.Minute}
	failed := make(chan error, 1)
	go func() { failed <- h.Serve(l) }()
	select {
	case err := <-failed:
		return err
	case <-ended:
		return h.Close()
	}
}

// server answers from the newest generation: it looks at Model.Stale before each
// request, and gives an old one back when its last request is over.
type server struct {
	reg *registry.Registry
	key string

	mu  sync.Mutex
	now *serving
	say *json.Encoder
}

type serving struct {
	m     *registry.Model
	users int  // requests that read from it
	old   bool // another one has taken its place
}

// change needs mu, but for the first time.
func (s *server) change() error {
	m, err := s.reg.Get(s.key)
	if err != nil {
		return err
	}
	before := s.now
	s.now = &serving{m: m}
	if before == nil {
		return s.say.Encode(notice{m.Generation(), clock()})
	}
	before.old = true
	return s.giveBack(before)
}

// giveBack needs mu.
func (s *server) giveBack(v *serving) error {
	if !v.old || v.users > 0 {
		return nil
	}
	if err := v.m.Close(); err != nil {
		return err
	}
	return s.say.Encode(notice{s.now.m.Generation(), clock()})
}

func (s *server) acquire() (*serving, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.now.m.Stale() {
		if err := s.change(); err != nil {
			return nil, err
		}
	}
	s.now.users++
	return s.now, nil
}

func (s *server) release(v *serving) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	v.users--
	return s.giveBack(v)
}

func (s *server) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	a, err := s.answer()
	if err != nil {
		a.Error = err.Error()
		w.WriteHeader(http.StatusInternalServerError)
	}
	_ = json.NewEncoder(w).Encode(a) // the client sees what is missing
}

func (s *server) answer() (a answer, err error) {
	v, err := s.acquire()
	if err != nil {
		return a, err
	}
	defer func() { err = errors.Join(err, s.release(v)) }()
	a.Generation = v.m.Generation()
	for _, f := range v.m.Files() {
		b, err := v.m.Bytes(f.Path)
		if err != nil {
			return a, err
		}
		pages := len(b) / tagEvery
		for _, page := range []int{0, rand.IntN(pages), rand.IntN(pages), pages - 1} {
			a.Tags = append(a.Tags, binary.LittleEndian.Uint64(b[page*tagEvery:]))
		}
	}
	return a, nil
}

// Files of the model that rollouts replaces, and their shares of its bytes in
// sixteenths.
var parts = []struct {
	path  string
	share int64
}{{"config.bin", 0}, {"layers/first.bin", 9}, {"layers/second.bin", 6}, {"head.bin", 1}}

func partSize(i int, size int64) int64 {
	return max(1, size*parts[i].share/16/tagEvery) * tagEvery
}

// writeSource makes a model of about size bytes whose every page says tag.
func writeSource(dir string, size int64, tag uint64) error {
	for i, part := range parts {
		b := make([]byte, partSize(i, size))
		for at := 0; at < len(b); at += tagEvery {
			binary.LittleEndian.PutUint64(b[at:], tag)
		}
		path := filepath.Join(dir, part.path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// canaryPlan is what the canary is told.
type canaryPlan struct {
	Tag    uint64
	Refuse bool
}

// canary looks at the generation that is to be published.
func canary(arg json.RawMessage) error {
	var p canaryPlan
	if err := json.Unmarshal(arg, &p); err != nil {
		return err
	}
	for _, part := range parts {
		f, err := os.Open(filepath.Join(os.Getenv("ONECOPY_PATH"), part.path))
		if err != nil {
			return err
		}
		var b [8]byte
		_, err = f.ReadAt(b[:], 0)
		f.Close()
		if err != nil {
			return err
		}
		if got := binary.LittleEndian.Uint64(b[:]); got != p.Tag {
			return fmt.Errorf("%s says %d, not %d", part.path, got, p.Tag)
		}
	}
	if p.Refuse {
		return errors.New("it is told to refuse this one")
	}
	return nil
}
